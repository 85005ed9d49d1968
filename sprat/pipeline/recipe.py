"""Recipes by name or path, and what only a model's own counts can say of one.

The configs are in ``sprat.config.recipe``, which knows no model: whether a dense twin costs what the teacher costs is
asked here, when a recipe is loaded.
"""

from __future__ import annotations

from pathlib import Path

from sprat.config import load
from sprat.config.recipe import PipelineRecipe
from sprat.config.sizes import size
from sprat.errors import ConfigError

EQUAL_TOLERANCE = 1.05  # what is called equal differs by no more
RECIPE_FOLDER = Path(__file__).parent.parent / "recipes"


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> PipelineRecipe:
    """The recipe in the file ``name``, or the packaged one where no such file is, with ``a.b=c`` overrides.

    Raises:
        ConfigError: no such recipe, an unknown key, a value that does not fit.
    """
    packaged = {path.stem: path for path in RECIPE_FOLDER.glob("*.toml")}
    path = packaged[name] if name in packaged and not Path(name).is_file() else Path(name)
    recipe = load(PipelineRecipe, path, overrides)
    check_dense_controls(recipe)
    return recipe


def check_dense_controls(recipe: PipelineRecipe) -> None:
    """Refuse a dense twin with experts, or one that has not in common with the teacher what it says.

    Raises:
        ConfigError: one of them, or a model that cannot be.
    """
    if not recipe.dense:
        return
    from sprat.model import count_parameters, flops_per_token  # with torch, which reading a recipe can do without

    pretrain, vocab_size, rows = recipe.pretrain, recipe.data.vocab_size, recipe.data.seq_len
    teacher = size(pretrain.model.size, **{"vocab_size": vocab_size, **pretrain.model.changes})
    for index, dense in enumerate(recipe.dense):
        config = size(dense.size, **{"vocab_size": vocab_size, **dense.changes})
        if config.n_routed_experts:
            todo = "give n_routed_experts = 0 or dense = true"
            raise ConfigError("a dense twin has no experts", where=f"dense.{index}.changes", todo=todo)
        steps = (dense.steps or pretrain.steps) / pretrain.steps
        ratio = {
            "FLOPs": steps * flops_per_token(config, rows) / flops_per_token(teacher, rows),
            "CPU seconds": 1.0,  # which only running it shows
            "parameters": count_parameters(config).total / count_parameters(teacher).total,
        }[dense.equal]
        if not 1 / EQUAL_TOLERANCE <= ratio <= EQUAL_TOLERANCE:
            what, todo = f"the twin has {ratio:.2f} times the teacher's {dense.equal}", "change its widths or steps"
            raise ConfigError(what, where=f"dense.{index}", todo=todo)
