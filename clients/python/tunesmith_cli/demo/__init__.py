"""`tunesmith demo`: a real model through the pair, from nothing. One file for each step."""
