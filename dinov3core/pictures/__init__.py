"""What features look like: colours, sheets, charts and pages of what evaluations and models give.

`gallery.write_gallery` draws any backbones, `states` and `charts` are what the report of a run is
made of. Pages are single files that need no network.
"""

from dinov3core import extras

if absent := extras.missing("numpy", "PIL"):
    raise extras.not_installed(absent)
