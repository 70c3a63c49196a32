"""Planning from data, as a program of its own: reads, renders, tokenizes, masks, mixes. Never imports torch itself."""
