"""Serves `ProjectService`: wire in, use case, wire out."""

from __future__ import annotations

from typing import Any

from control_service.api.dependencies import Dependencies
from control_service.api.paging import cut_page, page_limit
from control_service.api.requests import request_key
from control_service.api.wire.projects import project_draft, project_message
from control_service.app import projects
from tunesmith.control.v1 import project_service_pb2 as messages
from tunesmith.control.v1 import project_service_pb2_grpc


class ProjectServicer(project_service_pb2_grpc.ProjectServiceServicer):
    """Projects, towards clients."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._on = dependencies

    async def CreateProject(self, request: messages.CreateProjectRequest, context: Any) -> Any:
        """Stores a project."""
        project = await projects.create_project(
            project_draft(request.project),
            store=self._on.store,
            clock=self._on.clock,
            request=request_key(request, method="CreateProject"),
        )
        return messages.CreateProjectResponse(project=project_message(project))

    async def GetProject(self, request: messages.GetProjectRequest, context: Any) -> Any:
        """Reads one project."""
        project = await projects.get_project(request.project_id, store=self._on.store)
        return messages.GetProjectResponse(project=project_message(project))

    async def ListProjects(self, request: messages.ListProjectsRequest, context: Any) -> Any:
        """Lists projects by id."""
        filters = {"name_contains": request.name_contains}
        position = self._on.pages.decode(request.page_token, listing="projects", filters=filters)
        found = await projects.list_projects(
            store=self._on.store,
            after_id=int(position or 0),
            limit=page_limit(request.page_size),
            name_contains=request.name_contains,
        )
        page, following = cut_page(
            found,
            page_size=request.page_size,
            to_message=project_message,
            position=lambda project: str(project.project_id),
        )
        return messages.ListProjectsResponse(
            projects=page,
            next_page_token=self._on.pages.encode(following, listing="projects", filters=filters),
        )

    async def UpdateProject(self, request: messages.UpdateProjectRequest, context: Any) -> Any:
        """Replaces the masked fields."""
        project = await projects.update_project(
            request.project.project_id,
            project_draft(request.project),
            store=self._on.store,
            clock=self._on.clock,
            fields=tuple(request.update_mask.paths),
            etag=request.project.etag,
            request=request_key(request, method="UpdateProject"),
        )
        return messages.UpdateProjectResponse(project=project_message(project))

    async def DeleteProject(self, request: messages.DeleteProjectRequest, context: Any) -> Any:
        """Deletes a project that has no live job."""
        await projects.delete_project(
            request.project_id,
            store=self._on.store,
            clock=self._on.clock,
            request=request_key(request, method="DeleteProject"),
        )
        return messages.DeleteProjectResponse()
