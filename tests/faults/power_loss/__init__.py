"""Power loss: what our own writers do to the disk is recorded, and every moment of it is replayed as if the power had
gone then, without what was not synced. SQLite is trusted; its pragmas are tested apart."""
