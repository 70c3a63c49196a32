"""All repositories over one connection: what a function of the store is given."""

from __future__ import annotations

import sqlalchemy as sa

from control_service.adapters.sql.catalog_repositories import SqlDatasets, SqlNodes, SqlProjects, SqlRequests
from control_service.adapters.sql.event_log import SqlEventLog
from control_service.adapters.sql.job_repositories import SqlArtifacts, SqlCheckpoints, SqlJobs
from control_service.adapters.sql.touched import Touched


class SqlTransaction:
    """Implements `Transaction`."""

    def __init__(self, connection: sa.Connection, touched: Touched) -> None:
        self.projects = SqlProjects(connection)
        self.datasets = SqlDatasets(connection)
        self.jobs = SqlJobs(connection, touched)
        self.events = SqlEventLog(connection, touched)
        self.checkpoints = SqlCheckpoints(connection, touched)
        self.artifacts = SqlArtifacts(connection)
        self.nodes = SqlNodes(connection, touched)
        self.requests = SqlRequests(connection)
