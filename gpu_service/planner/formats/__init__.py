"""One module a dataset format: a row becomes text with the spans that carry loss. They tokenize nothing."""
