"""What this product can do, as data: each entry is a torch-free file and one REGISTRY line. Builds nothing itself."""
