"""Errors a user can cause. Each says what was found, what was expected and what to do.

All derive from ValueError, so `except ValueError` catches every one of them.
"""


class RFTError(ValueError):
    """Base of the named errors of this package."""


class ConfigConflictError(RFTError):
    """Two settings contradict each other, or a setting is out of its range."""


class DatasetNotFoundError(RFTError):
    """A data root, an annotation file or an image is not where it was looked for."""


class AnnotationError(RFTError):
    """An annotation file was found but its content cannot be used."""


class EmptyClassError(RFTError):
    """A requested class has no usable example in the training split."""


class CheckpointError(RFTError):
    """A policy checkpoint cannot be found, or is not a vision-language model."""


class CheckpointSaveError(RFTError):
    """A checkpoint could not be written; the one before it is whole."""


class DeviceMemoryError(RFTError):
    """A device has not enough memory, and what can be done about it without the user has been done."""


class PromptTooLongError(RFTError):
    """A prompt has more tokens than the limit. Prompts are never truncated."""


class NonFiniteError(RFTError):
    """A loss, reward or gradient is NaN or infinite."""


class DownloadError(RFTError):
    """A file cannot be fetched, or an archive cannot be unpacked safely."""


class ChecksumError(DownloadError):
    """A file has another checksum than its publisher states."""


class RewardError(RFTError):
    """A reward raised an exception, or did not return in time."""
