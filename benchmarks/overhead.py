"""What a drafter adds to its target: parameters, and bytes of keys and values for each position of the text.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

The embedded pair is loaded and measured; of the known shapes only sizes are computed, nothing is allocated.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common import about, add_common
from ctc_drafter.bench.results import check_output, write_json
from ctc_drafter.cli.options import plain_errors
from ctc_drafter.drafters import CTCDrafter, load_drafter
from ctc_drafter.target import Target
from ctc_drafter.words import byte_size, percent, size
from shapes import SHAPES, config_of, drafter_of


def row(name: str, target: Target, drafter: CTCDrafter, target_bytes: int, itemsize: int) -> dict[str, Any]:
    """Sizes and their ratios; `total` counts weights and the cache of a full context of 4,096 positions."""
    parameters = target.num_parameters
    layer = drafter.module.layers[0]
    own = 2 * len(drafter.module.layers) * layer.kv_heads * layer.dim * itemsize
    both = [
        count * itemsize + 4096 * each for count, each in ((drafter.num_parameters, own), (parameters, target_bytes))
    ]
    return {
        "name": name,
        "parameters": parameters,
        "drafter_parameters": drafter.num_parameters,
        "position_bytes": target_bytes,
        "drafter_position_bytes": own,
        "parameters_ratio": drafter.num_parameters / parameters,
        "cache_ratio": own / target_bytes,
        "total_ratio": both[0] / both[1],
    }


def of_shape(name: str) -> dict[str, Any]:
    config = config_of(name)
    with torch.device("meta"):
        target = Target(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), None, name)
        drafter = drafter_of(target, 0)
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return row(name, target, drafter, each, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "float32")
    options = parser.parse_args()
    check_output(options.json, options.overwrite)
    target = Target.load(dtype=options.dtype, device=options.device)
    drafter: Any = load_drafter("ctc", target)
    rows = [row("embedded", target, drafter, target.position_bytes, target.dtype.itemsize)]
    assert rows[0]["drafter_position_bytes"] == drafter.position_bytes
    rows += [of_shape(name) for name in SHAPES]
    for r in rows:
        ratios = [percent(r[f"{key}_ratio"], 1) for key in ("parameters", "cache", "total")]
        print(
            f"{r['name']:14}{size(r['parameters']):>8} + {size(r['drafter_parameters']):>8} parameters ({ratios[0]}), "
            f"{byte_size(r['position_bytes'])} + {byte_size(r['drafter_position_bytes'])} a position ({ratios[1]}), "
            f"together {ratios[2]}"
        )
    write_json(options.json, {**about(), "rows": rows})
    print(f"Result: {options.json}")


if __name__ == "__main__":
    with plain_errors():
        main()
