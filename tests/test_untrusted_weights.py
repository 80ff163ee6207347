"""Files of weights from strangers: whatever they hold, one sentence, in bounded time and memory."""

import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3core.checkpoints import files, load_model, load_weights, save_weights
from dinov3core.checkpoints.errors import LONGEST, WeightsError
from dinov3core.checkpoints.files import EXTRAS
from dinov3core.models import build
from dinov3core.train.engine.named_models import open_backbone
from tests.fuzzing import campaign, limited

VIT = dict(depth=2, width=48, heads=3)
NOTHING = object()
# of torch about the pickle protocol that a damaged file names
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def model(name: str = "vit_nano8", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **(arguments or VIT)).eval()


def refused(path: Path, match: str, read: Callable[[Path], object] = load_model) -> None:
    """One printable line that names the file, in a second and 64 MB."""
    with pytest.raises(WeightsError, match=match) as caught, limited(seconds=5, megabytes=64):
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable()
    assert len(message) <= LONGEST + len(str(path)) + 10


def write_safetensors(path: Path, header: bytes, body: bytes, length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + body)
    return path


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_weights(model(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def restate(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a file of ours with another description of the model."""
    header, body = parts(file)
    ours = json.loads(header["__metadata__"]["dinov3core"])
    change(ours)
    header["__metadata__"]["dinov3core"] = json.dumps(ours)
    write_safetensors(file, json.dumps(header).encode(), body)


ARGUMENTS = {
    "depth": (10**9, 10**400, -1, 0, 2.0, "2", True, [2], float("nan"), NOTHING),
    "width": (10**9, 0, -4, 48.0, 52),
    "heads": (0, -1, 2.5, 10**9),
    "patch_size": (0, 10**9, -8, 8.5),
    "in_channels": (0, 10**9),
    "registers": (-1, 10**12),
    "ffn": ("gelu", 1, ["mlp"]),
    "ffn_ratio": (float("nan"), float("inf"), 1e30, -1, 0),
    "norm": ("batch", 7),
    "rope_base": (float("nan"), float("inf"), 0, -1, "100"),
    "rope_min_period": (0, 1e-30),
    "rope_normalize": ("none", 1),
    "rope_dtype": ("load", "int64", "float8_e4m3fn", 7),
    "layer_scale": (float("nan"), "1e-5"),
    "qkv_bias": ("no", 2),
    "unheard_of": (1,),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_our_header_are_checked_before_anything_is_built(file, name):
    for value in ARGUMENTS[name]:

        def change(ours: dict[str, Any], value: object = value) -> None:
            ours["arguments"][name] = value
            if value is NOTHING:
                del ours["arguments"][name]

        restate(file, change)
        refused(file, f"{name}|rotation of|width=52")
        save_weights(model(), file)


STATISTICS = {
    "deviation 0": [[0.1] * 3, [0.0] * 3],
    "negative deviation": [[0.1] * 3, [0.2, 0.2, -0.2]],
    "4 channels": [[0.1] * 4, [0.2] * 4],
    "3 and 4": [[0.1] * 3, [0.2] * 4],
    "words": [["a"] * 3, [0.2] * 3],
    "NaN": [[float("nan")] * 3, [0.2] * 3],
    "no lists": [1, 2],
    "no pair": [[0.1] * 3],
    "a number": 5,
    "a word": "imagenet",
    "nested": [[[0.1]] * 3, [0.2] * 3],
}
unusable_statistics = pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)


@unusable_statistics
def test_image_statistics_of_our_header(file, statistics):
    restate(file, lambda ours: ours.update(statistics=statistics))
    refused(file, "statistics|mean|std")
    refused(file, "statistics|mean|std", lambda path: load_weights(model(), path))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("family", "resnet", "expected family vit or convnext"),
        ("family", ["vit"], "expected family in the header to be text"),
        ("arguments", [1], "expected arguments in the header to be a JSON object"),
        ("arguments", None, "missing depth"),
        ("rotation", 7, "expected rotation in the header to be text"),
        ("version", [], "expected version 1 of our header"),
    ],
)
def test_other_fields_of_our_header(file, name, value, match):
    restate(file, lambda ours: ours.update({name: value}))
    refused(file, match)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def test_headers_that_no_writer_writes(file):
    header, body = parts(file)
    text = json.dumps(header).encode()
    for length in (2**63, 2**64 - 1, len(text) + 10**9):
        refused(write_safetensors(file, text, body, length), "complete safetensors")
    refused(write_safetensors(file, nested(10**5).encode(), body), "complete safetensors")
    for inner, match in (
        (nested(10**5), "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"version": 1, "version": 1}', "'version' stands there twice"),
        ("1" * 5000, "expected JSON"),
    ):
        header["__metadata__"]["dinov3core"] = inner
        refused(write_safetensors(file, json.dumps(header).encode(), body), match)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F99"},
        {"shape": [-48]},
        {"shape": [2**62, 4]},
        {"shape": []},
        {"shape": "48"},
        {"data_offsets": [0, 192]},
        {"data_offsets": [10**12, 10**12 + 192]},
        {"data_offsets": [192, 0]},
    ],
    ids=str,
)
def test_entries_of_a_safetensors_header(file, entry):
    header, body = parts(file)
    header["norm.weight"] |= entry
    refused(write_safetensors(file, json.dumps(header).encode(), body), "complete safetensors")


TENSORS = {
    "expanded to 4 TB": (torch.ones(1).expand(2**40), "expanded from 4 bytes"),
    "expanded": (torch.ones(1).expand(48), "expanded from 4 bytes"),
    "sparse": (torch.ones(48).to_sparse(), "sparse one .* in norm.weight"),
    "huge and sparse": (
        torch.sparse_coo_tensor(
            [[0]],
            [1.0],
            (2**40,),
            check_invariants=True,
        ),
        "sparse one",
    ),
    "meta": (torch.ones(2**40, device="meta"), "without values"),
    "complex": (torch.ones(48, dtype=torch.complex64), "complex64 in norm.weight"),
    "bool": (torch.ones(48, dtype=torch.bool), "bool in norm.weight"),
    "float8": (torch.ones(48).to(torch.float8_e4m3fn), "float8_e4m3fn in norm.weight"),
    "3e38": (torch.full((48,), 3e38), "expected values up to 65504, .* got 3e.38 in norm.weight"),
    "-1e5": (torch.full((48,), -1e5), "got 100000 in norm.weight"),
    "infinite": (torch.full((48,), float("inf")), "NaN or Inf in norm.weight"),
    "no dimension": (torch.tensor(1.0), r"norm.weight of shape \[48\], got \[\]"),
    "empty": (torch.ones(0), r"norm.weight of shape \[48\], got \[0\]"),
}


@pytest.mark.parametrize(("tensor", "match"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_no_weights(tmp_path, tensor, match):
    torch.save({**model().state_dict(), "norm.weight": tensor}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", match)
    refused(tmp_path / "weights.pth", match, lambda path: load_weights(model(), path))


def test_quantised_and_nested_tensors(tmp_path):
    with warnings.catch_warnings():  # torch calls both a thing of the past
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.qint8)
        many = torch.nested.nested_tensor([torch.ones(48), torch.ones(3)])
        for tensor, match in ((quantised, "quantised one"), (many, "nested one")):
            torch.save({**model().state_dict(), "norm.weight": tensor}, tmp_path / "weights.pth")
            refused(tmp_path / "weights.pth", match)


@pytest.mark.parametrize("periods", [0.0, -1.0, 1e-30])
def test_periods_that_positions_cannot_be_divided_by(tmp_path, periods):
    state = model().state_dict()
    state["rope_embed.periods"][1] = periods
    torch.save(state, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "expected rope_embed.periods of at least 1e-06")


@pytest.mark.parametrize("shape", [(), (0,), (1, 1, 0), (48,), (1, 1, 50)])
def test_a_tensor_that_fixes_sizes_has_other_dimensions(tmp_path, shape):
    torch.save({**model().state_dict(), "cls_token": torch.ones(shape)}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "cls_token|width")


def test_many_tensors_of_one_memory(tmp_path):
    """A file of 4 MB that would ask for 2 GB once anything is copied."""
    shared = torch.ones(2**20)
    state = model().state_dict()
    state |= {f"blocks.{index}.gate": shared for index in range(500)}
    torch.save(state, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 5e6
    refused(tmp_path / "weights.pth", "expected tensors with memory of their own")


def test_compressed_archives_are_not_taken_for_numbers(tmp_path):
    """torch.load maps the file: it would hand out the compressed bytes as float32."""
    save_weights(model(), tmp_path / "weights.pth", "official")
    with zipfile.ZipFile(tmp_path / "weights.pth") as stored:
        entries = {entry: stored.read(entry) for entry in stored.namelist()}
    with zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
        packed.writestr("archive/data/bomb", bytes(2**26))
    refused(tmp_path / "weights.pth", "got a compressed one")


def test_names_that_are_no_names(tmp_path):
    state = model().state_dict()
    torch.save({**state, 7: torch.ones(3), "epoch": 5, None: "x"}, tmp_path / "weights.pth")
    assert load_model(tmp_path / "weights.pth").report.loaded == len(state)
    first = "blocks.0.norm1."
    for name in (f"{first}\n\x1b[31m", f"{first}\\1", "x" * 10**6, "\udcff", "blocks."):
        torch.save({**state, name: torch.ones(3)}, tmp_path / "weights.pth")
        refused(tmp_path / "weights.pth", "unexpected|shape|expected", load_model)


@pytest.mark.parametrize(
    "content",
    [[], 7, "x", torch.ones(3), {}, {"model": {}}, {"teacher": [1]}],
)
def test_pickles_without_a_model(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "expected a dictionary of tensors|expected a DINOv3 ViT")


def respond(path: Path, file: str, change: dict[str, Any]) -> None:
    """Change fields of a JSON file; a name with a dot goes one deeper."""
    content = json.loads((path / file).read_text())
    for name, value in change.items():
        outer, _, inner = name.rpartition(".")
        (content[outer] if outer else content)[inner] = value
    (path / file).write_text(json.dumps(content))


CONFIGS = {
    "huggingface": {
        "num_attention_heads": (0, -1, 10**400, 3.0, "3", True, [3], float("nan"), 5),
        "rope_theta": (float("nan"), float("inf"), 0, -100.0, "100", [100.0]),
        "layer_norm_eps": (float("nan"), 0.1, "1e-5"),
        "model_type": (7, ["dinov3_vit"], "dinov2"),
        "num_hidden_layers": (24, "2"),
        "hidden_size": (96,),
        "patch_size": (16,),
    },
    "timm": {
        "architecture": (7, ["vit"], "vit_small_patch16_224"),
        "num_features": ("48", 0),
        "model_args": ([1], "x"),
        "pretrained_cfg": ([1], "x"),
        "model_args.num_heads": (0, 3.0, "3", 5),
        "model_args.rope_temperature": (float("nan"), -1, "100"),
        "model_args.rope_rotate_half": ("no", 0),
        "model_args.depth": (24,),
        "pretrained_cfg.mean": ([0.1, 0.2], "x", [None] * 3),
        "pretrained_cfg.std": ([0.0] * 3, [-1.0] * 3, [0.1] * 4, 5),
    },
}


@pytest.mark.parametrize("layout", CONFIGS)
def test_config_json_of_other_layouts(tmp_path, layout):
    source = model()
    for name, values in CONFIGS[layout].items():
        for value in values:
            save_weights(source, tmp_path, layout)
            (tmp_path / EXTRAS).unlink()
            respond(tmp_path, "config.json", {name: value})
            refused(tmp_path, name.rpartition(".")[2] + "|config.json|heads|statistics")


@unusable_statistics
def test_preprocessor_config(tmp_path, statistics):
    save_weights(model(), tmp_path, "huggingface")
    (tmp_path / EXTRAS).unlink()
    mean, std = (
        statistics
        if isinstance(
            statistics,
            list,
        )
        and len(statistics) == 2
        else (statistics, [0.2] * 3)
    )
    respond(tmp_path, "preprocessor_config.json", {"image_mean": mean, "image_std": std})
    refused(tmp_path, "statistics|image_mean|image_std")


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "model.safetensors.index.json"],
)
def test_json_of_any_content(tmp_path, name):
    for text in (nested(10**5), "[]", "7", "", "\x00", '{"a": 1, "a": 2}', " " * (2**24 + 1)):
        save_weights(model(), tmp_path, "huggingface", shard_bytes=30_000)
        (tmp_path / name).write_text(text)
        refused_below(tmp_path, "expected JSON|expected a JSON object|expected a weight_map")


def refused_below(folder: Path, match: str) -> None:
    """Refused with a sentence that names a file of the folder."""
    with pytest.raises(WeightsError, match=match) as caught, limited(seconds=5, megabytes=128):
        load_model(folder)
    assert str(caught.value).startswith(str(folder)) and str(caught.value).isprintable()


def test_an_index_leads_nowhere_else(tmp_path):
    folder = tmp_path / "folder"
    save_weights(model(), folder, "huggingface", shard_bytes=30_000)
    outside = tmp_path / "outside.safetensors"
    save_weights(model(), outside)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for shard in (
        "../outside.safetensors",
        str(
            outside,
        ),
        "../../../etc/passwd",
        "",
        ".",
        "..",
        7,
        ["x"],
        None,
    ):
        index.write_text(json.dumps({"weight_map": weight_map | {"norm.weight": shard}}))
        refused_below(folder, "expected names of shards beside it|expected shard")
    for content in ({"weight_map": []}, {"weight_map": {}}, {}):
        index.write_text(json.dumps(content))
        refused_below(folder, "expected a weight_map|expected a DINOv3")


def test_links_in_a_folder_are_followed_as_download_caches_need_it(tmp_path):
    save_weights(model(), tmp_path / "blobs", "huggingface")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert load_model(tmp_path / "snapshot").report.layout == "huggingface"
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    refused(tmp_path / "loop.pth", "found nothing there")


def test_what_is_no_file_is_not_opened(tmp_path):
    for name in ("weights.pth", "model.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    refused(tmp_path / "weights.pth", "got a pipe, socket or device")
    refused(tmp_path, "expected one file of weights in the folder, got none")
    refused(Path("/dev/zero"), "got a pipe, socket or device")
    save_weights(model(), tmp_path / "mine.pth", "official")
    assert load_model(tmp_path).report.layout == "official"


def test_folders_of_very_many_files(tmp_path):
    for index in range(5000):
        (tmp_path / f"{index:05d}.pth").touch()
    refused(tmp_path, "got 00000.pth, 00001.pth, 00002.pth, 00003.pth and 4996 more; name the file")


def test_only_numbered_steps_are_checkpoints(tmp_path):
    for number, name in enumerate(
        ("step_00000010", "step_00000020", "step_final", "step_00000030.tmp"),
    ):
        source = model()
        nn.init.constant_(source.norm.weight, number)
        save_weights(source, tmp_path / "checkpoints" / name / "teacher.safetensors")
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    assert load_model(tmp_path).model.norm.weight[0] == 1


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    save_weights(model(), tmp_path / "weights.pth", "official")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "_is_safetensors", denied)
    refused(tmp_path / "weights.pth", "expected a readable file, got: Permission denied")


@pytest.mark.parametrize("size", [10**9, -5, 0, float("nan"), "x", [], [1], [16, "x"], None, {}])
def test_the_recipe_beside_weights_states_no_size_of_crops(file, size):
    recipe = {"recipe": {"crops": {"global_size": size}}}
    (file.parent / "config.json").write_text(json.dumps(recipe))
    assert open_backbone(str(file)).size == 0


def test_what_lies_beside_weights_and_is_no_recipe(file):
    config = file.parent / "config.json"
    for text in (nested(10**5), "[]", "\x00"):
        config.write_text(text)
        assert open_backbone(str(file)).size == 0
    config.unlink()
    os.mkfifo(config)
    with limited(seconds=5, megabytes=64):
        assert open_backbone(str(file)).size == 0
    config.unlink()
    config.write_text('{"recipe": {"crops": {"global_size": [48, 32]}}}')
    assert open_backbone(str(file)).size == 32


def sound(path: Path) -> None:
    """Reads a file and, if it is taken, sees that the model works."""
    loaded = load_model(path)
    state = loaded.model.state_dict()
    assert all(isinstance(tensor, Tensor) and tensor.isfinite().all() for tensor in state.values())
    assert str(loaded.report)
    statistics = loaded.model.statistics
    if statistics is not None:
        assert all(value > 0 for value in statistics.std)
    with torch.no_grad():
        features = loaded.model.float().features(torch.zeros(1, loaded.model.in_channels, 64, 64))
    assert features.cls.isfinite().all() and features.patches.isfinite().all()


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder of small valid files: two families in every layout."""
    folder = tmp_path / "samples"
    for family, source in (
        ("vit", model("vit_nano8", depth=1, width=8, heads=1)),
        ("convnext", model("convnext_tiny", depths=(1,) * 4, widths=(4, 4, 4, 8))),
    ):
        save_weights(source, folder / f"{family}.safetensors")
        save_weights(source, folder / f"{family}.pth", "official")
        old = {"_use_new_zipfile_serialization": False}
        torch.save(source.state_dict(), folder / f"{family}-old.pth", **old)
        save_weights(source, folder / f"{family}-huggingface", "huggingface", shard_bytes=3_000)
        save_weights(source, folder / f"{family}-timm", "timm")
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fuzzed_files(samples, tmp_path, suffix):
    contents = {path.name: path.read_bytes() for path in samples.glob(f"*{suffix}")}
    outcome = campaign(contents, sound, WeightsError, tmp_path, files=600)
    assert outcome.refused > outcome.accepted > 0


REBUILDERS = [
    f"ctorch._utils\n_rebuild_{kind}\n".encode()
    for kind in (
        "tensor",
        "sparse_tensor",
        "meta_tensor_no_storage",
        "nested_tensor",
        "qtensor",
        "wrapper_subclass",
        "parameter",
    )
]


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_fuzzed_pickles(samples, tmp_path, family):
    """The pickle inside an archive, which is otherwise in order."""
    with zipfile.ZipFile(samples / f"{family}.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    inner = next(name for name in entries if name.endswith("data.pkl"))

    def read(path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "weights.pth", "w") as packed:
            for name, content in entries.items():
                packed.writestr(name, path.read_bytes() if name == inner else content)
        sound(tmp_path / "weights.pth")

    words = [*REBUILDERS, b"cos\nsystem\n", b"\x8a\x09" + b"\xff" * 9, *b"Q R } ] ) .".split()]
    campaign({"pickle": entries[inner]}, read, WeightsError, tmp_path, files=300, words=words)


WORDS = b'null NaN -Infinity 1e999 -1 0 [] {} "" 999999999999999999999 true'.split()


@pytest.mark.parametrize(
    "folder",
    ["vit-huggingface", "convnext-huggingface", "vit-timm", "convnext-timm"],
)
def test_fuzzed_json_beside_weights(samples, folder):
    """Without our own description beside it, which would be believed first."""
    (samples / folder / EXTRAS).unlink()
    contents = {path.name: path.read_bytes() for path in (samples / folder).glob("*.json")}
    for name, content in contents.items():
        outcome = campaign(
            {name: content},
            lambda path: sound(path.parent),
            WeightsError,
            samples / folder,
            files=100,
            words=WORDS,
        )
        assert outcome.refused
        (samples / folder / name).write_bytes(content)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_fuzzed_header_of_ours(samples, tmp_path, family):
    header, body = parts(samples / f"{family}.safetensors")
    ours = header["__metadata__"]["dinov3core"].encode()

    def read(path: Path) -> None:
        header["__metadata__"]["dinov3core"] = path.read_text(errors="replace")
        text = json.dumps(header).encode()
        sound(write_safetensors(tmp_path / "weights.safetensors", text, body))

    outcome = campaign({"header": ours}, read, WeightsError, tmp_path, files=400, words=WORDS)
    assert outcome.refused > outcome.accepted
