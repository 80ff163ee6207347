"""Published features of the released weights: does a file of yours give them here?

    from dinov3core.checkpoints import published

    print(published.check("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "000000039769.jpg"))

The weights are gated and the photograph is image 000000039769 of COCO val2017; nothing here
downloads either. The values are those that the conversion script of transformers compares with: the
first five channels of the normed CLS token and of the normed first patch, of the photograph as
floats resized to 224 x 224 (bilinear, antialiased), with ImageNet statistics for every model.
"""

import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3core.checkpoints.load import load_model
from dinov3core.models import IMAGENET

TOLERANCE = 1e-3  # of that script
# A name and its ten values, again and again.
_TABLE = """
vits16 0.463561 -0.415609 0.408236 -0.126613 -0.286636 -0.038754 -0.250895 -0.016392 -0.455473
    0.571582
vits16plus -0.471349 -1.365778 -0.317983 0.377219 -0.769085 0.144551 -0.388117 -0.393433 -0.157695
    -0.600380
vitb16 1.034643 -0.180609 -0.341018 -0.066376 -0.011383 -0.082523 -0.456272 -0.728029 -0.430680
    -0.152880
vitl16 0.484527 -0.582214 0.480636 0.592040 0.945166 -0.211367 -0.490863 -0.257131 0.101763 0.154511
vith16plus -0.064575 -0.148866 -0.621524 0.634878 0.152695 -0.093817 0.287407 -0.050036 0.428043
    0.094561
vit7b16 0.275439 -0.261353 0.067772 0.049936 -0.158747 0.044442 -0.052542 0.070777 -0.065111
    -0.026546
vitl16_sat -0.33235 0.34052 -0.22087 0.21434 0.09003 0.18488 0.30309 -0.20689 0.12848 0.06207
vit7b16_sat -0.19779 0.11819 -0.00581 -0.21055 -0.03971 -0.12423 0.07879 -0.10057 0.02835 -0.11727
convnext_tiny -6.372119 1.300791 2.074303 -0.079975 0.607205 0.490530 -3.713466 1.848513 -1.040319
    -1.090818
convnext_small -0.903914 1.412183 0.287465 0.175296 -2.397940 -1.081114 0.637362 3.748765 0.170179
    1.445153
convnext_base 0.155366 -0.378771 -0.735157 -2.818718 0.015095 3.039118 0.778155 -1.961322 -1.607147
    -2.411941
convnext_large -2.219094 -0.594451 -2.300294 -0.957415 -0.520473 -1.477349 -0.217038 -3.128137
    0.418962 0.334949
""".split()
PUBLISHED = {
    _TABLE[place]: torch.tensor([float(value) for value in _TABLE[place + 1 : place + 11]])
    for place in range(0, len(_TABLE), 11)
}


class Published(NamedTuple):
    """The release that a file turned out to be, with its difference from the published values."""

    name: str
    difference: float


def check(weights: str | os.PathLike, photograph: str | os.PathLike) -> Published:
    """Compare a file or folder of weights with the published values of every release.

    Raises:
        ValueError: when it gives those of none within 1e-3, with the nearest; or when one of the
            two cannot be read.
    """
    model = load_model(weights).model.float()
    try:
        with Image.open(photograph, formats=("JPEG", "PNG")) as image:
            rgb = torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{photograph}: expected COCO val2017 image 000000039769, got no image ({error})"
        ) from error
    pixels = rgb.permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        tokens = model.forward_features(IMAGENET.normalise(pixels))
    release = nearest(torch.cat([tokens.cls[0, :5], tokens.patches[0, 0, :5]]))
    if not release.difference <= TOLERANCE:
        raise ValueError(
            f"{weights}: expected the published features of a release within {TOLERANCE:g}, got "
            f"values that differ by {release.difference:.3g} from the nearest, {release.name}; "
            "take its original weights and COCO val2017 image 000000039769"
        )
    return release


def nearest(values: Tensor) -> Published:
    """The release whose ten published values are nearest to `values`."""
    differences = {name: (values - wanted).abs().max().item() for name, wanted in PUBLISHED.items()}
    name = min(differences, key=differences.__getitem__)
    return Published(name, differences[name])
