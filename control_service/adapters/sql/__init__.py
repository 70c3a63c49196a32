"""The database: schema, migrations, the store with its one writer, the event log."""
