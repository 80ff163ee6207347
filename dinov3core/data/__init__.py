"""Images for training and for judging: sources, views, labelled sets, built-in scenes."""

from dinov3core import extras

if absent := extras.missing("numpy", "PIL", "tqdm"):
    raise extras.not_installed(absent)

from dinov3core.data.crops import CropSettings, MultiCrop, Views
from dinov3core.data.datasets import (
    DataOptions,
    open_any,
    open_labelled,
    open_ranged,
    open_segmented,
    open_videos,
)
from dinov3core.data.decode import PixelFormat
from dinov3core.data.errors import DataError, UnreadableImage
from dinov3core.data.images import DatasetSource, FileSource, ImageSource, open_source
from dinov3core.data.labelled import Labelled, Pair, Ranged, Segmented, Video
from dinov3core.data.scenes import Scenes, SceneSet

__all__ = [
    "CropSettings",
    "DataError",
    "DataOptions",
    "DatasetSource",
    "FileSource",
    "ImageSource",
    "Labelled",
    "MultiCrop",
    "Pair",
    "PixelFormat",
    "Ranged",
    "SceneSet",
    "Scenes",
    "Segmented",
    "UnreadableImage",
    "Video",
    "Views",
    "open_any",
    "open_labelled",
    "open_ranged",
    "open_segmented",
    "open_source",
    "open_videos",
]
