import pytest

from cxrfast.phantoms.dataset import synth
from cxrfast.shards.build import build as build_set
from cxrfast.shards.format.recipe import ImageRecipe


@pytest.fixture(scope="session", params=["jpeg", "raw"])
def corrupt(request, tmp_path_factory):
    """A tree with unusable images and a missing one, and its set at two scales. Read-only."""
    recipe = ImageRecipe(codec=request.param)
    tree, out = (tmp_path_factory.mktemp("corrupt") / name for name in ("mimic", "set"))
    synth(tree, images=130, size=64, corrupt=6, workers=1)
    sorted(tree.rglob("*.jpg"))[7].unlink()
    build_set(tree, out, [16, 32], recipe=recipe, workers=1, allow_missing=True)
    return tree, out
