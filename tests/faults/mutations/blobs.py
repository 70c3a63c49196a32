"""What control's promises hang on in the bytes that it keeps."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_RECOVERY = "tests/integration/control_core/test_recovery.py::"
_STOPPING = "tests/integration/control_core/test_stopping.py::"
_BLOBS = "tests/unit/control_edge/test_blobs.py::"
_DURABLE = "tests/unit/faults/test_durable_writes.py::"
_KEPT = "tests/integration/control_core/test_kept_bytes.py::"

BYTES = (
    Mutation(
        name="a-blob-is-renamed-unsynced",
        promise="R1",
        file="control_service/adapters/blobs/disk.py",
        snippet="os.fsync(self._file.fileno())",
        replacement="pass",
        tests=(f"{_DURABLE}test_a_blob_of_control",),
    ),
    Mutation(
        name="a-blobs-name-is-not-synced",
        promise="R1",
        file="control_service/adapters/blobs/disk.py",
        snippet="fsync_directory(target.parent)",
        replacement="fsync_directory(self._directory)",
        tests=(f"{_DURABLE}test_a_blob_of_control",),
    ),
    Mutation(
        name="a-new-directory-of-blobs-is-not-synced",
        promise="R1",
        file="control_service/adapters/blobs/disk.py",
        snippet="fsync_directory(self._directory)",
        replacement="fsync_directory(target.parent)",
        tests=(f"{_DURABLE}test_a_blob_of_control",),
    ),
    Mutation(
        name="an-outputs-place-is-not-synced",
        promise="R7",
        file="control_service/adapters/blobs/output.py",
        snippet="dst_dir_fd=parent)\n            os.fsync(parent)",
        replacement="dst_dir_fd=parent)\n            pass",
        tests=(f"{_DURABLE}test_an_output",),
    ),
    Mutation(
        name="a-copied-output-is-not-synced",
        promise="R7",
        file="control_service/adapters/blobs/output.py",
        snippet="os.fsync(writer.fileno())",
        replacement="pass",
        tests=(f"{_DURABLE}test_an_output",),
    ),
    Mutation(
        name="a-copied-output-is-not-compared",
        promise="R19",
        file="control_service/adapters/blobs/output.py",
        snippet="if digest.hexdigest() != sha256:",
        replacement="if False:",
        tests=(f"{_BLOBS}test_an_output_is_copied_and_verified_where_links_cannot_be",),
    ),
    Mutation(
        name="bytes-of-a-node-are-believed",
        promise="R19",
        file="control_service/app/fetch.py",
        snippet="if staged.sha256 != file.sha256 or staged.size_bytes != file.size_bytes:",
        replacement="if False:",
        tests=(f"{_RECOVERY}test_artifacts_that_cannot_be_had_fail_the_job_typed",),
    ),
    Mutation(
        name="a-job-succeeds-before-its-bytes-are-here",
        promise="R7",
        file="control_service/app/collector.py",
        snippet="await fetch_files(client, self._blobs, fact.files)",
        replacement="pass",
        tests=("tests/integration/control_core/test_job_path.py::test_a_job_runs_to_its_collected_artifacts",),
    ),
    Mutation(
        name="an-output-is-deleted-after-its-record",
        promise="R1",
        file="control_service/app/jobs.py",
        snippet="        await blobs.remove_output(path=output_path)\n"
        "    await free_unnamed(await store.transact(work), store=store, blobs=blobs)",
        replacement="        pass\n"
        "    await free_unnamed(await store.transact(work), store=store, blobs=blobs)\n"
        "    await blobs.remove_output(path=output_path or 'x')",
        tests=(f"{_STOPPING}test_a_delete_that_could_not_free_the_output_can_be_done_again",),
    ),
    Mutation(
        name="bytes-that-records-name-are-freed",
        promise="R1",
        file="control_service/app/content.py",
        snippet="[s for s in sha256s if not tx.datasets.content_is_used(s)]",
        replacement="list(sha256s)",
        tests=(f"{_KEPT}test_bytes_that_two_jobs_have_go_with_the_second",),
    ),
    Mutation(
        name="a-backup-calls-itself-finished-all-the-time",
        promise="R1",
        file="control_service/backup.py",
        snippet="    _fsync(staged)\n    staged.rename(path)",
        replacement="    staged.rename(path)",
        tests=(f"{_DURABLE}test_the_summary_of_a_backup",),
    ),
)
