"""Every error that robolake raises on purpose, as one tree.

RobolakeError
|-- LakeError                  something about a lake
|   |-- LakeNotFoundError      no lake at this URI
|   |-- LakeExistsError        a lake is already there
|   |-- LakeTooNewError        written by a newer robolake than this one
|   |-- LakeDamagedError       the tables disagree with the index
|   |-- ReleaseNotFoundError   no release of this name
|   `-- ReleaseExistsError     the name is taken by other contents
|-- StoreError                 the storage under a lake
|   |-- StoreUnreachableError  no answer, no bucket, or no permission
|   |-- StoreFullError         no space left
|   `-- StoreUnsafeError       it ignores conditional puts
|-- CommitError                a commit that cannot go on
|   `-- CommitUnknownError     whether it happened could not be found out
|-- WorkerDiedError            a task's workers died again and again
|-- TrainingDataError          what a run reads
|   |-- BadSampleError         a sample cannot be made from what the release holds
|   |-- LoaderClosedError      a loader was used after it was closed, or in another process
|   `-- AuditError             a run saw other samples than it ought to have seen
|-- CheckpointError            a checkpoint's files are not what they ought to be
`-- SourceError                a source as a whole cannot be ingested
    |-- SourceNotFoundError    nothing there, or the store does not answer
    |-- SourceMetadataError    metadata missing, empty or invalid
    |-- SourceVersionError     a version or format that is not supported
    `-- SourceTooBadError      more bad episodes than max_bad_fraction allows

EpisodeError stands beside the tree: one bad episode is data. It ends in the
quarantine with its reason and never stops a job.
"""


class RobolakeError(Exception):
    """Root of the errors that robolake raises on purpose."""


class LakeError(RobolakeError):
    """Something about a lake."""


class LakeNotFoundError(LakeError):
    """There is no lake at this URI."""


class LakeExistsError(LakeError):
    """A lake is already there."""


class LakeTooNewError(LakeError):
    """The lake was written by a newer robolake than this one."""


class LakeDamagedError(LakeError):
    """The tables disagree with the index of episodes."""


class ReleaseNotFoundError(LakeError):
    """The lake has no release of this name."""


class ReleaseExistsError(LakeError):
    """The release name is taken by other contents."""


class StoreError(RobolakeError):
    """The storage under a lake cannot do what is needed."""


class StoreUnreachableError(StoreError):
    """The storage gave no answer, or refused the bucket or the credentials."""


class StoreFullError(StoreError):
    """The storage has no space left."""


class StoreUnsafeError(StoreError):
    """The storage ignores conditional puts, so commits would be lost silently."""


class CommitError(RobolakeError):
    """A commit cannot go on."""


class CommitUnknownError(CommitError):
    """Whether a commit happened could not be found out."""


class WorkerDiedError(RobolakeError):
    """The workers of one task died again and again."""


class TrainingDataError(RobolakeError):
    """Something about what a run reads."""


class BadSampleError(TrainingDataError):
    """A sample cannot be made from what the release holds of it."""


class LoaderClosedError(TrainingDataError):
    """A loader was used after it was closed, or in another process than that which opened it."""


class AuditError(TrainingDataError):
    """A run saw other samples than it ought to have seen."""


class CheckpointError(RobolakeError):
    """A checkpoint's files are damaged, or not those of the model."""


class SourceError(RobolakeError):
    """A source as a whole cannot be ingested."""


class SourceNotFoundError(SourceError):
    """There is nothing at the source's URI, or its store does not answer."""


class SourceMetadataError(SourceError):
    """The source's metadata is missing, empty or invalid."""


class SourceVersionError(SourceError):
    """The source has a format or version that is not supported."""


class SourceTooBadError(SourceError):
    """More of the source's episodes are bad than the job allows."""


class EpisodeError(Exception):
    """One episode cannot be ingested.

    Args:
        reason: one of the codes in ``ingest.validate.REASONS``.
        message: what, which value, and where, for the person who mends it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
