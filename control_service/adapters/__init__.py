"""What fills the ports of the application: the database, nodes, blobs, the clock."""
