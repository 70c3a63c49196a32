"""The command `tunesmith`. Speaks to a control service through `tunesmith_client`; imports neither service."""
