"""Domain values to the control service's messages and back, one file for each noun. Calls nothing."""
