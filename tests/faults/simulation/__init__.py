"""A seeded simulation of control in virtual time: its real core against nodes in memory, with schedules of faults."""
