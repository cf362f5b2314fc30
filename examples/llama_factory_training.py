"""Lets LLaMA-Factory itself train a reward model, with vhead's class in the place of TRL's.

It trains a LoRA adapter and the head on pairs of the demo's texts: the chosen text is natural, and the rejected one is
its corrupted twin. `pairwise_reward_model.py` trains on such pairs in a loop of its own, without LLaMA-Factory.

    pip install vhead llamafactory==0.9.4
    DISABLE_VERSION_CHECK=1 python examples/llama_factory_training.py
"""

import argparse
import json
from pathlib import Path

import vhead.compat.trl
from vhead import formats
from vhead.demo import demo_model_path
from vhead.demo.rollouts import NATURAL, read_demo_rollouts

# LLaMA-Factory imports the class while it is imported itself, so this has to come first.
vhead.compat.trl.install()

from llamafactory.train.tuner import run_exp  # noqa: E402


def write_pairs(folder: Path) -> None:
    """Writes a data set as LLaMA-Factory reads it: the pairs, and a file that says what each column is."""
    rollouts = read_demo_rollouts()
    natural = {rollout.topic: rollout.completion for rollout in rollouts if rollout.kind == NATURAL}
    pairs = [
        {"instruction": r.prompt, "input": "", "chosen": natural[r.topic], "rejected": r.completion}
        for r in rollouts
        if r.kind != NATURAL
    ]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    information = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(information))


def main() -> None:
    """Trains the reward model, and prints what was saved."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("reward-model"))
    arguments = parser.parse_args()
    write_pairs(arguments.output / "data")
    run_exp(
        {
            "stage": "rm",
            "do_train": True,
            "model_name_or_path": str(demo_model_path()),
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_target": "q_proj,v_proj",
            "dataset": "pairs",
            "dataset_dir": str(arguments.output / "data"),
            "template": "empty",
            "cutoff_len": 256,
            "output_dir": str(arguments.output / "adapter"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": arguments.steps,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
        }
    )
    history = json.loads((arguments.output / "adapter" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    quarter = max(1, len(losses) // 4)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    print(f"pairwise loss: {first:.3f} in the first quarter, {last:.3f} in the last")
    print("saved:", formats.detect(arguments.output / "adapter").reason)


if __name__ == "__main__":
    main()
