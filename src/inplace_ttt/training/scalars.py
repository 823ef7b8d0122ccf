"""Name the scalars in W&B and TensorBoard."""


def scalars_of(record: dict) -> dict[str, float]:
    """Return the scalars of a record of metrics.jsonl, named such as ``train/loss``, ``eval/loss``,
    ``eval_loss/position_0_2048`` and ``eval_loss/source_web``."""
    prefix = "eval/" if record.get("eval") else "train/"
    found = {key if "/" in key else prefix + key: value for key, value in record.items() if type(value) in (int, float)}
    parts = {f"position_{one['from']}_{one['to']}": one for one in record.get("position", [])}
    parts |= {f"source_{one['name']}": one for one in record.get("sources", [])}
    for name, one in parts.items():
        found |= {f"eval_{key}/{name}": one[key] for key in one if key.startswith("loss")}
    return found
