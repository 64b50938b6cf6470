"""Images as strangers send them, through the ways users hand them over: a folder of data, and `allmlp predict`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from allmlp.checkpoints import run_directory
from allmlp.cli import main
from allmlp.data.image_batches import evaluation_transform
from allmlp.data.images import load_images
from allmlp.data.labelled_images import DECODING_BYTES, PIXEL_LIMIT, UnreadableImage
from tests.pictures import write_classes
from tests.strange_pictures import PIXELS, black, legal, refused

ROOT = Path(__file__).parents[2]
SMALL = {"num_blocks": 1, "embed_dim": 8, "img_size": 8}


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """A run directory."""
    model = timm.create_model("gmlp_nano_patch4_32", num_classes=3, **SMALL)
    run_directory.save_classifier(
        run_directory.classifier(model, "gmlp_nano_patch4_32", SMALL, ["a", "b", "c"]), tmp_path / "run"
    )
    return str(tmp_path / "run")


def test_a_folder_gives_the_right_pixels_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", each=2)
    shown, reasons = legal(root / "red"), refused(root / "blue", tmp_path / "mark")
    reasons.pop("pipe.png")  # no file of the folder
    found = load_images(str(root))
    parts = (found.train, found.validation)
    pixels = {Path(name).name: part.sources[place] for part in parts for place, name in enumerate(part.names)}
    for name, expected in shown.items():
        np.testing.assert_array_equal(pixels[name], expected, err_msg=name)
    assert len(found.unreadable) == len(reasons)
    left_out = {Path(line.partition(" (")[0]).name: line for line in found.unreadable}
    for name, reason in reasons.items():
        assert f"{root / 'blue' / name} (" in left_out[name]
        assert reason in left_out[name]
    assert not (tmp_path / "mark").exists()


def test_predict_names_every_file_and_sees_the_same_pixels_in_each_format(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, reasons = legal(tmp_path), refused(tmp_path, tmp_path / "mark")
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    names = ["plain.png", *shown, *reasons]
    assert main(["predict", classifier, *(str(tmp_path / name) for name in names), "--json"]) == 0
    answer = capsys.readouterr()
    found = {Path(entry["file"]).name: entry for entry in json.loads(answer.out)}
    for name, expected in shown.items():
        assert "error" not in found[name]
        if expected is PIXELS:
            assert found[name]["predictions"] == found["plain.png"]["predictions"]
    for name, reason in reasons.items():
        assert reason in found[name]["error"]
    assert f"left out {len(reasons)} of {len(names)}: {tmp_path / 'empty.png'} (not an image)" in answer.err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["bomb.png", "wide.png", "cut.png", "empty.png", "pipe.png"])
def test_one_refused_file_gets_one_message_that_names_it(
    name: str, tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = refused(tmp_path, tmp_path / "mark")[name]
    assert main(["predict", classifier, str(tmp_path / name), "--strict"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"allmlp: {tmp_path / name} cannot be read as an image: ")
    assert reason in said
    assert said.count("\n") == 1


def test_an_image_is_not_resized_without_bound() -> None:
    line = Image.new("RGB", (8192, 82))
    cfg = {"input_size": (3, 1024, 1024), "crop_pct": 1.0, "interpolation": "bilinear"}
    assert evaluation_transform({**cfg, "input_size": (3, 64, 64)})(line).shape == (3, 64, 64)
    for settings in ({}, {"input_size": (3, 64, 64), "crop_pct": 0.01}):
        with pytest.raises(UnreadableImage, match="8,192 × 82 pixels would become"):
            evaluation_transform({**cfg, **settings})(line)


# Prints by how much decoding each file raised the process's highest resident memory, in bytes.
_MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from allmlp.data.labelled_images import UnreadableImage, decode

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

raised = {}
for file in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the highest is the present one again
    before = resident("VmRSS")
    try:
        np.asarray(decode(file))
    except UnreadableImage:
        pass
    raised[Path(file).name] = resident("VmHWM") - before
print(json.dumps(raised))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory as Linux tells it")
def test_memory_stays_below_the_stated_bound(tmp_path: Path) -> None:
    side, noise = 1024, np.random.default_rng(0).integers(0, 256, (512, 512, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(noise).resize((side, side))
    rgb = image.convert("RGB")
    rgb.save(tmp_path / "progressive.jpg", progressive=True, subsampling=0, exif=exif)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", progressive=True, exif=exif)
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif", compression="tiff_lzw")
    image.save(tmp_path / "rgba.png", compress_level=1, exif=exif)
    rgb.convert("P").save(tmp_path / "palette.png", compress_level=1, transparency=b"\0\xff", exif=exif)
    rgb.convert("P").save(tmp_path / "palette.gif")
    Image.new("I;16", (side, side), 3000).save(tmp_path / "grey16.png", compress_level=1, exif=exif)
    image.save(tmp_path / "rgba.webp", method=0, exif=exif)
    (tmp_path / "largest.png").write_bytes(black(8192, 8192))
    (tmp_path / "bomb.png").write_bytes(black(8192, 8193))
    (tmp_path / "line.png").write_bytes(black(PIXEL_LIMIT, 1))
    files = sorted(str(path) for path in tmp_path.iterdir())
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", _MEASURE, *files]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    raised = json.loads(done.stdout)
    assert len(raised) == 11
    for name, pixels in {**dict.fromkeys(raised, side * side), "largest.png": PIXEL_LIMIT}.items():
        # What a library keeps for good, whatever the image.
        assert raised[name] < DECODING_BYTES * pixels / PIXEL_LIMIT + 2**24, name
    assert raised["largest.png"] > 3 * PIXEL_LIMIT
    assert max(raised["bomb.png"], raised["line.png"]) < 2**23
