"""Export: plain operators only, one and any batch size, the same numbers out of the file."""

import pytest
import torch

from dinov3core import export as command
from dinov3core.checkpoints import save_weights
from dinov3core.models import build
from dinov3core.models.layers import Attention

MODELS = {
    "mlp, any batch": ("vit_nano8", dict(depth=2), 0),
    "swiglu, untied, four channels": (
        "vit_nano8",
        dict(depth=1, ffn="swiglu", untie_cls_norm=True, in_channels=4),
        3,
    ),
    "convnext, any batch": ("convnext_tiny", dict(depths=(1, 1, 1, 1), widths=(8, 12, 16, 20)), 0),
}
BOUND = 2e-5  # float32 rounding of another order of operations; outputs are of order one


def made(name, arguments):
    torch.manual_seed(0)
    model = build(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name, arguments, batch", MODELS.values(), ids=MODELS)
def test_torch_export(tmp_path, name, arguments, batch):
    model = made(name, arguments)
    assert command.export(model, tmp_path / "m.pt2", 64, 96, batch) < BOUND
    program = torch.export.load(tmp_path / "m.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators and not [op for op in operators if "dinov3core" in op]
    outputs = program.module()(torch.randn(batch or 5, model.in_channels, 64, 96))
    assert outputs[0].shape == (batch or 5, model.width)


@pytest.mark.parametrize("name, arguments, batch", MODELS.values(), ids=MODELS)
def test_onnx(tmp_path, name, arguments, batch):
    onnx = pytest.importorskip(
        "onnx", reason="pip install onnx onnxruntime onnxscript to test ONNX export"
    )
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert command.export(made(name, arguments), tmp_path / "m.onnx", 64, 96, batch) < BOUND
    written = onnx.load(tmp_path / "m.onnx")
    assert [o.version for o in written.opset_import if o.domain == ""] == [command.OPSET]
    assert {o.domain for o in written.opset_import} <= {""}
    assert [i.name for i in written.graph.input] == ["images"]  # no masks
    assert not {"Sin", "Cos"} & {
        node.op_type for node in written.graph.node
    }  # tables are constants
    first = written.graph.input[0].type.tensor_type.shape.dim[0]
    assert first.dim_value == batch and bool(first.dim_param) == (batch == 0)


def test_a_wrong_file_shows_in_the_printed_difference(tmp_path, monkeypatch):
    model = made("vit_nano8", dict(depth=2))
    monkeypatch.setattr(command, "rope_rotate", lambda x, sin, cos, prefix: x)
    assert command.export(model, tmp_path / "m.pt2", 64, 96) > 100 * BOUND


def test_the_model_is_left_as_it_was(tmp_path):
    model = made("vit_nano8", dict(depth=2))
    with command.plain_operators(model):
        assert not [m for m in model.modules() if type(m) is Attention]
    assert len([m for m in model.modules() if type(m) is Attention]) == 2


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        command, "find_spec", lambda name: None if name == "onnxruntime" else object()
    )
    with pytest.raises(
        ValueError,
        match=r"missing onnxruntime; install them with pip install 'dinov3core\[export\]'",
    ):
        command.export(made("vit_nano8", dict(depth=1)), tmp_path / "m.onnx", 64, 64)


def test_command(tmp_path, capsys):
    save_weights(made("vit_nano8", dict(depth=2)), tmp_path / "m.safetensors")
    command.main(
        [
            str(tmp_path / "m.safetensors"),
            str(tmp_path / "m.pt2"),
            "--height",
            "32",
            "--width",
            "48",
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "batches of any size, 32 x 48 px," in printed
        and "largest difference from the model is" in printed
    )
    for arguments, match in (
        (["m.tflite"], "expected a name ending in .onnx or .pt2"),
        (["m.pt2", "--height", "30"], "expected positive multiples of 8, got 30 x 224"),
        (["m.pt2", "--width", "0"], "expected positive multiples of 8, got 224 x 0"),
        (["m.pt2", "--batch", "-1"], "0 for any number, got -1"),
    ):
        with pytest.raises(SystemExit, match=match):
            command.main(
                [str(tmp_path / "m.safetensors"), str(tmp_path / arguments[0]), *arguments[1:]]
            )
