"""The rules of the control service. Standard library only: no wire, no store, no log."""
