"""Steps that bring a database to the shape of `schema`, run at every start."""
