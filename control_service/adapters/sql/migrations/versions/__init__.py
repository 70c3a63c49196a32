"""One file per step, named for what it does; a released step is never changed."""
