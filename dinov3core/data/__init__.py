"""Images for training and for judging: sources, crops, masks, labelled sets."""

from dinov3core import extras

if absent := extras.missing("numpy", "PIL"):
    raise extras.not_installed(absent)
