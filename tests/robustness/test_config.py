"""Config files, their values, and the command line: what run/train.py and ``initialize`` check before data are read."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.config.base import BLOCK, checked, read_file
from ds_al.config.settings import Settings
from ds_al.data import load_vision
from ds_al.experiment.architecture import Architecture
from ds_al.experiment.config import experiment_config, override
from ds_al.experiment.description import Description
from ds_al.experiment.inputs import DataFacts
from ds_al.experiment.run_folder import checkpoints_of, make_folder
from ds_al.module import ALPipelineModule
from tests.support.robustness import Case, Kind, by_name, meet, within

ROOT = Path(__file__).parents[2]
HERE = "tests/robustness/test_config.py"
SECTION = "Config and command line"
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 10,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
    "steps_per_print": None,
    BLOCK: {"method": "streaming"},
    "experiment": {
        "name": "run",
        "model": {"name": "mlp", "options": {"widths": [16, 16]}},
        "data": {"name": "fashion-mnist-small"},
        "epochs": 1,
    },
}

KINDS: list[Kind] = [
    Kind(
        section=SECTION,
        name="a file that is not JSON in UTF-8",
        outcome="refused",
        what="UTF-16, Latin-1, binary, empty, nested without end, a list, a folder: the error names file and place; a "
        "byte order mark is fine.",
        tests=(f"{HERE}::test_text_of_a_config",),
    ),
    Kind(
        section=SECTION,
        name="a key twice in one object",
        outcome="refused",
        what="It is named with both values, at every depth, in files and in `--set`.",
        tests=(f"{HERE}::test_text_of_a_config", f"{HERE}::test_command_line"),
    ),
    Kind(
        section=SECTION,
        name="a value of another type",
        outcome="refused",
        what='Types are JSON\'s, without conversion: `true` is no number, `"2"` and `2.0` are no integers.',
        tests=(f"{HERE}::test_value_of_a_config", f"{HERE}::test_option_of_a_model"),
    ),
    Kind(
        section=SECTION,
        name="NaN, infinite numbers, 1e400, NUL, halves of surrogate pairs",
        outcome="refused",
        what="The error names the path of the key.",
        tests=(f"{HERE}::test_text_of_a_config", f"{HERE}::test_mapping"),
    ),
    Kind(
        section=SECTION,
        name="a misspelt key, in any block",
        outcome="refused",
        what="The nearest key of that block is proposed, in DeepSpeed's blocks, too.",
        tests=(f"{HERE}::test_value_of_a_config",),
    ),
    Kind(
        section=SECTION,
        name="a key of DeepSpeed that is off",
        outcome="honoured",
        what="`false`, `null`, 0, empty blocks and blocks with `enabled: false` pass, whatever else they hold.",
        tests=(f"{HERE}::test_key_that_is_off",),
    ),
    Kind(
        section=SECTION,
        name='`"auto"` of transformers',
        outcome="refused",
        what="Sizes that follow from the others are filled in, and buckets of ZeRO ignored; any other is named.",
        tests=(f"{HERE}::test_key_of_deepspeed", f"{HERE}::test_sizes_are_filled_in"),
    ),
    Kind(
        section=SECTION,
        name="what DeepSpeed would assert after the start",
        outcome="refused",
        what="Batch sizes that disagree, log level, monitors that are misspelt or not installed: named at start.",
        tests=(f"{HERE}::test_key_of_deepspeed",),
    ),
    Kind(
        section=SECTION,
        name="names and folders of a run",
        outcome="refused",
        what="A name is one folder's, without separators; an output that is a file or cannot be written to is named "
        "before data are read.",
        tests=(f"{HERE}::test_value_of_a_config", f"{HERE}::test_output_that_cannot_be_written_to"),
    ),
    Kind(
        section=SECTION,
        name="seeds",
        outcome="refused",
        what="Booleans, texts, negative and huge numbers, in a config and as `base_seed` of a module.",
        tests=(f"{HERE}::test_seed_of_a_module", f"{HERE}::test_value_of_a_config"),
    ),
    Kind(
        section=SECTION,
        name="options that make no network",
        outcome="refused",
        what="Negative, zero, textual or huge widths are named before memory is allocated.",
        tests=(f"{HERE}::test_option_of_a_model",),
    ),
    Kind(
        section=SECTION,
        name="the config.json of a run",
        outcome="honoured",
        what="It runs again as it is: what the run has added is left out, its recipe's settings stay.",
        tests=(f"{HERE}::test_the_config_of_a_run_runs_again",),
    ),
    Kind(
        section=SECTION,
        name="`--resume` with the folder of a run",
        outcome="honoured",
        what="The checkpoints in it are meant; a folder that does not exist is refused before data are read.",
        tests=(f"{HERE}::test_resume_finds_the_checkpoints_of_a_run",),
    ),
    Kind(
        section=SECTION,
        name="arguments of commands",
        outcome="refused",
        what="Numbers that are negative or not finite, files that cannot be written, sizes that are never simulated.",
        tests=(f"{HERE}::test_command_line", f"{HERE}::test_arguments_of_other_commands"),
    ),
]


def text(**changes: Any) -> str:
    return json.dumps({**BASE, **changes})


TEXTS: list[Case] = [
    Case(name="valid", given=text().encode(), message=None),
    Case(name="a byte order mark", given=b"\xef\xbb\xbf" + text().encode(), message=None),
    Case(name="UTF-8 in a name", given=json.dumps({"a": "é"}, ensure_ascii=False).encode(), message=None),
    Case(name="binary", given=b"\xff\x00\x12\x80" * 20, message="is not UTF-8.*position 0.*save it as UTF-8"),
    Case(name="UTF-16", given=text().encode("utf-16"), message="is not UTF-8"),
    Case(name="UTF-16 without a mark", given=text().encode("utf-16-le"), message="is not valid JSON"),
    Case(name="UTF-32", given=text().encode("utf-32"), message="is not UTF-8"),
    Case(name="a name in Latin-1", given=b'{"a": "caf\xe9"}', message="is not UTF-8.*0xe9 in position 10"),
    Case(name="empty", given=b"", message="is not valid JSON"),
    Case(name="blanks", given=b" \n\t ", message="is not valid JSON"),
    Case(name="a list", given=b"[1, 2]", message="holds a list: expected an object"),
    Case(name="a number", given=b"3", message="holds a int: expected an object"),
    Case(name="null", given=b"null", message="holds a NoneType: expected an object"),
    Case(name="a comma too many", given=b'{"a": 1,}', message="is not valid JSON.*line 1"),
    Case(name="cut off", given=text().encode()[:-9], message="is not valid JSON"),
    Case(name="two objects", given=b"{} {}", message="is not valid JSON: Extra data"),
    Case(name="comments", given=b'{"a": 1} // one', message="is not valid JSON"),
    Case(name="single quotes", given=b"{'a': 1}", message="is not valid JSON"),
    Case(name="100,000 lists deep", given=b'{"a": ' + b"[" * 100_000, message="nested too deep"),
    Case(name="100,000 objects deep", given=b'{"a":' * 100_000, message="nested too deep"),
    Case(name="an integer of 5,000 digits", given=b'{"a": ' + b"9" * 5000 + b"}", message="is not valid JSON"),
    Case(name="a key twice", given=b'{"epochs": 1, "b": 2, "epochs": 500}', message='"epochs" is given twice.* 1 '),
    Case(name="a key twice in a block", given=b'{"a": {"b": [{"c": 1, "c": 1}]}}', message='"c" is given twice'),
    Case(name="NaN", given=b'{"a": {"b": NaN}}', message='"a.b": got nan: expected a finite number'),
    Case(name="Infinity", given=b'{"a": [1, Infinity]}', message='"a.1": got inf: expected a finite number'),
    Case(name="-Infinity", given=b'{"a": -Infinity}', message='"a": got -inf'),
    Case(name="1e400", given=b'{"a": 1e400}', message='"a": got inf: expected a finite number'),
    Case(name="half of a surrogate pair", given=b'{"a": {"b": "\\ud800"}}', message='"a.b".*half of a surrogate pair'),
    Case(name="half of a pair in a key", given=b'{"a": {"\\udfff": 1}}', message='"a".*half of a surrogate pair'),
    Case(name="a whole pair", given=b'{"a": "\\ud83d\\ude00"}', message=None),
    Case(name="NUL", given=b'{"a": "x\\u0000y"}', message='"a": got .*expected a text without NUL'),
]  # fmt: skip

DEEPSPEED: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("valid", {}, None),
        ("micro-batch size true", {"train_micro_batch_size_per_gpu": True}, 'gpu": got True: .*valid integer'),
        ("micro-batch size text", {"train_micro_batch_size_per_gpu": "10"}, "gpu\": got '10': .*valid integer"),
        ("micro-batch size 10.0", {"train_micro_batch_size_per_gpu": 10.0}, 'gpu": got 10.0: .*valid integer'),
        ("micro-batch size 0", {"train_micro_batch_size_per_gpu": 0}, 'gpu": got 0: .*greater than or equal to 1'),
        ("micro-batch size -1", {"train_micro_batch_size_per_gpu": -1}, 'gpu": got -1'),

        ("micro-batch size auto", {"train_micro_batch_size_per_gpu": "auto"}, "gpu\": got 'auto'"),
        ("micro-batches true", {"gradient_accumulation_steps": True}, 'gradient_accumulation_steps": got True'),
        ("micro-batches text", {"gradient_accumulation_steps": "2"}, "gradient_accumulation_steps\": got '2'"),
        ("micro-batches 0", {"gradient_accumulation_steps": 0}, 'gradient_accumulation_steps": got 0'),
        ("micro-batches auto", {"gradient_accumulation_steps": "auto"}, None),
        ("batch agrees", {"train_batch_size": 20}, None),
        ("batch auto", {"train_batch_size": "auto"}, None),
        ("batch disagrees", {"train_batch_size": 7}, 'train_batch_size": got 7, which is not .* 10 x 2 x 1 = 20'),
        ("batch text", {"train_batch_size": "20"}, "train_batch_size\": got '20': .*valid integer"),
        ("batch true", {"train_batch_size": True}, 'train_batch_size": got True'),
        ("batch list", {"train_batch_size": [20]}, "train_batch_size\": got \\[20\\]"),
        ("steps_per_print text", {"steps_per_print": "5"}, "steps_per_print\": got '5'"),
        ("steps_per_print negative", {"steps_per_print": -5}, 'steps_per_print": got -5'),
        ("steps_per_print 0", {"steps_per_print": 0}, None),
        ("log_level", {"log_level": "loud"}, "log_level\": got 'loud': .*'debug', 'info', 'warning'"),
        ("log_level 3", {"log_level": 3}, 'log_level": got 3'),
        ("dump_state text", {"dump_state": "yes"}, "dump_state\": got 'yes': .*boolean"),
        ("disable_python_gc text", {"disable_python_gc": "x"}, "disable_python_gc\": got 'x': .*boolean"),
        ("disable_python_gc 1", {"disable_python_gc": 1}, 'disable_python_gc": got 1: .*boolean'),
        ("wandb a number", {"wandb": 3}, '"wandb": got 3'),
        ("wandb misspelt", {"wandb": {"enabeld": True}}, "wandb.enabeld\" is not a key.*did you mean 'enabled'"),
        ("wandb team a number", {"wandb": {"enabled": True, "team": 3}}, 'wandb.team": got 3'),
        ("tensorboard enabled text", {"tensorboard": {"enabled": "x"}}, "tensorboard.enabled\": got 'x': .*boolean"),
        ("tensorboard misspelt", {"tensorboard": {"output": "x"}}, "tensorboard.output.*did you mean 'output_path'"),
        ("csv_monitor path a number", {"csv_monitor": {"enabled": True, "output_path": 3}}, 'csv_monitor.output_path'),
        ("comet misspelt", {"comet": {"projekt": "x"}}, "comet.projekt.*did you mean 'project'"),
        ("comet mode", {"comet": {"mode": "make"}}, "comet.mode\": got 'make'"),
        ("comms_logger misspelt", {"comms_logger": {"enabled": True, "typo": 1}}, '"comms_logger" is not supported'),
        ("gradient_clipping auto", {"gradient_clipping": "auto"}, 'gradient_clipping": got "auto", which transformers'),
        ("gradient_clipping true", {"gradient_clipping": True}, 'gradient_clipping": got True'),
        ("gradient_clipping 1", {"gradient_clipping": 1}, 'gradient_clipping": got 1.*layer_gradient_clipping'),
        ("bf16 auto", {"bf16": {"enabled": "auto"}}, 'bf16.enabled": got "auto"'),
        ("bf16 text", {"bf16": {"enabled": "true"}}, "bf16.enabled\": got 'true'"),
        ("bf16 misspelt", {"bf16": {"enable": True}}, "bf16.enable\".*did you mean 'enabled'"),
        ("fp16 auto", {"fp16": {"enabled": "auto", "loss_scale": 0}}, 'fp16.enabled": got "auto"'),
        ("lr auto", {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, 'optimizer.params.lr": got "auto"'),
        (
            "warm-up auto",
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
            'scheduler.params.warmup_num_steps": got "auto"',
        ),
        ("ZeRO stage true", {"zero_optimization": {"stage": True}}, 'zero_optimization": got .*expected {"stage": 1}'),
        ("ZeRO stage text", {"zero_optimization": {"stage": "1"}}, 'zero_optimization": got .*expected {"stage": 1}'),
        ("ZeRO stage 2", {"zero_optimization": {"stage": 2}}, "got stage 2.*set stage 1"),
        ("ZeRO misspelt", {"zero_optimization": {"stage": 0, "reduce_bucket_siz": 1}}, "mean 'reduce_bucket_size'"),
        ("ZeRO 1 with buckets", {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}, "bucket_size.*remove"),
        ("ZeRO 1 with auto", {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, None),
        ("checkpoint misspelt", {"checkpoint": {"tag_validatoin": "Warn"}}, "did you mean 'tag_validation'"),
        ("pipeline misspelt", {"pipeline": {"activation_checkpointing": 1}}, "Only activation_checkpoint_interval"),
        ("pipeline interval true", {"pipeline": {"activation_checkpoint_interval": True}}, "interval.*got True"),
        ("a key of DeepSpeed misspelt", {"optimzer": {}}, "\"optimzer\" is not a key.*did you mean 'optimizer'"),
        ("an off key misspelt", {"wall_clock_breakdwn": False}, "did you mean 'wall_clock_breakdown'"),
        ("wall_clock_breakdown on", {"wall_clock_breakdown": True}, "wall_clock_breakdown\" is not supported.*stats"),
        ("sparse_gradients on", {"sparse_gradients": True}, 'sparse_gradients" is not supported'),
        ("predivide factor", {"gradient_predivide_factor": 2.0}, 'gradient_predivide_factor".*got 2.0'),
        ("only micro-batches", {"train_micro_batch_size_per_gpu": None}, "got None: expected a whole number"),
    ]
]  # fmt: skip

OFF: list[Case] = [
    Case(name=json.dumps(given), given=given, message=None) for given in [
        {"wall_clock_breakdown": False},
        {"memory_breakdown": False},
        {"prescale_gradients": False},
        {"sparse_gradients": False},
        {"disable_allgather": False},
        {"dataloader_drop_last": False},
        {"zero_allow_untested_optimizer": False},
        {"zero_allow_untested_optimizer": True},
        {"zero_force_ds_cpu_optimizer": False},
        {"communication_data_type": None},
        {"gradient_predivide_factor": 1.0},
        {"gradient_allreduce_op": "mean"},
        {"gradient_clipping": 0},
        {"gradient_clipping": False},
        {"amp": {"enabled": False, "opt_level": "O1"}},
        {"amp": {}},
        {"fp16": {"enabled": False, "loss_scale": 0}},
        {"bf16": {"enabled": False}},
        {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
        {"flops_profiler": {"enabled": False, "profile_step": 5}},
        {"flops_profiler": {"profile_step": 5, "enabled": False, "output_file": None}},
        {"comms_logger": {"enabled": False, "verbose": True}},
        {"tensorboard": {"enabled": False, "job_name": "x"}},
        {"comet": {"enabled": False}},
        {"elasticity": {"enabled": False}},
        {"autotuning": {"enabled": False}},
        {"compression_training": {}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5e8, "overlap_comm": True}},
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {}},
        {"zero_optimization": None},
        {"checkpoint": {"use_node_local_storage": False}},
        {"data_types": {"grad_accum_dtype": None}},
        {"sequence_parallel_size": 1},
    ]
]  # fmt: skip

BLOCKS: list[Case] = [
    Case(name=f"{path} = {json.dumps(value)[:40]}", given={path: value}, message=message) for path, value, message in [
        (f"{BLOCK}", [], "is a list: expected an object"),
        (f"{BLOCK}.method", "1f1b", f"^\"{BLOCK}.method\": got '1f1b': [^\\n]*'streaming'[^\\n]*'bp_1f1b'[^\\n]*$"),
        (f"{BLOCK}.method", 3, f'^"{BLOCK}.method": got 3'),
        (f"{BLOCK}.method", ["streaming"], f'^"{BLOCK}.method": got'),
        (f"{BLOCK}.queue_depth", "2", "queue_depth\": got '2': .*valid integer"),
        (f"{BLOCK}.queue_depth", True, 'queue_depth": got True: .*valid integer'),
        (f"{BLOCK}.queue_depth", None, 'queue_depth": got None'),
        (f"{BLOCK}.queue_depth", 10**12, "queue_depth.*less than or equal to"),
        (f"{BLOCK}.receive_slots", 2.0, 'receive_slots": got 2.0: .*valid integer'),
        (f"{BLOCK}.receive_slots", 1, 'receive_slots": got 1: .*greater than or equal to 2'),
        (f"{BLOCK}.layer_gradient_clipping", True, 'layer_gradient_clipping": got True: .*valid number'),
        (f"{BLOCK}.layer_gradient_clipping", "1", "layer_gradient_clipping\": got '1'"),
        (f"{BLOCK}.layer_gradient_clipping", 1, None),
        (f"{BLOCK}.stall_seconds", "1", "stall_seconds\": got '1'"),
        (f"{BLOCK}.stall_seconds", 0, 'stall_seconds": got 0'),
        (f"{BLOCK}.steps_per_batch", True, 'steps_per_batch": got True'),
        (f"{BLOCK}.steps_per_batch", 3, "does not divide"),
        (f"{BLOCK}.check_inputs", "false", "check_inputs\": got 'false': .*boolean"),
        (f"{BLOCK}.check_inputs", 0, 'check_inputs": got 0: .*boolean'),
        (f"{BLOCK}.message_dtype", "fp8", "message_dtype\": got 'fp8'"),
        (f"{BLOCK}.trace", True, 'trace": got True'),
        (f"{BLOCK}.trace.batches", [2, "6"], "trace.batches.1\": got '6'"),
        (f"{BLOCK}.trace.batches", [6, 2], "trace.batches.*1 <= first <= last"),
        (f"{BLOCK}.trace.batches", [2], "trace.batches"),
        (f"{BLOCK}.trace.enabeld", True, "trace.enabeld.*did you mean 'enabled'"),
        (f"{BLOCK}.checkpoint.keep_lst", 1, "checkpoint.keep_lst.*did you mean 'keep_last'"),
        (f"{BLOCK}.checkpoint.keep_last", True, 'keep_last": got True'),
        (f"{BLOCK}.link", {"delay": 1}, "link.delay.*did you mean 'delay_ms'"),
        (f"{BLOCK}.link", {"mbit": "10"}, "link.mbit\": got '10'"),
        (f"{BLOCK}.compile", {"function": ["f"]}, "compile.function.*did you mean 'functions'"),
        (f"{BLOCK}.compile", {"functions": ["f", 3]}, 'compile.functions.1": got 3'),
        (f"{BLOCK}.autoencoder_optimizer", {"typ": "SGD"}, "autoencoder_optimizer.typ.*did you mean 'type'"),
        (f"{BLOCK}.queue_deph", 2, "did you mean 'queue_depth'"),
        ("optimizer", [], '"optimizer": got \\[\\], expected an object'),
        ("optimizer", None, '"optimizer": got None, expected an object'),
        ("optimizer.params", [1], '"optimizer.params": got'),
        ("optimizer.params.lr", True, '"optimizer.params.lr": got True, expected a finite number'),
        ("optimizer.params.lr", "0.1", "\"optimizer.params.lr\": got '0.1', expected a finite number"),
        ("optimizer.params.lr", -1, '"optimizer.params.lr": got -1'),
        ("scheduler", 3, '"scheduler": got 3, expected an object'),
        ("scheduler", {"type": "NoSuchLR"}, '"scheduler.type": got .NoSuchLR.'),
        ("scheduler", {"type": 3}, '"scheduler.type": got 3'),
        ("scheduler", {"type": "WarmupLR", "params": 3}, '"scheduler.params": got 3'),
        ("experiment", None, '"experiment" is a NoneType'),
        ("experiment", [], '"experiment" is a list'),
        ("experiment.epochs", "1", "experiment.epochs\": got '1'"),
        ("experiment.epochs", True, 'experiment.epochs": got True'),
        ("experiment.epochs", 1.0, 'experiment.epochs": got 1.0'),
        ("experiment.epochs", 0, 'experiment.epochs": got 0'),
        ("experiment.seed", True, 'experiment.seed": got True'),
        ("experiment.seed", -1, 'experiment.seed": got -1'),
        ("experiment.seed", 2**70, "experiment.seed.*less than"),
        ("experiment.seed", 2**31 - 1, None),
        ("experiment.name", "", "experiment.name\": got '': .*a name for one folder"),
        ("experiment.name", "  ", "a name for one folder"),
        ("experiment.name", "/tmp/elsewhere", "a name for one folder"),
        ("experiment.name", "..", "a name for one folder"),
        ("experiment.name", ".", "a name for one folder"),
        ("experiment.name", "../up", "a name for one folder"),
        ("experiment.name", "a/b", "a name for one folder"),
        ("experiment.name", "a\\b", "a name for one folder"),
        ("experiment.name", "x" * 300, "a name for one folder"),
        ("experiment.name", "é" * 60, "100 bytes at most"),
        ("experiment.name", "a\0b", "experiment.name.*without NUL"),
        ("experiment.name", 2024, 'experiment.name": got 2024'),
        ("experiment.name", "Fashion MNIST, é", None),
        ("experiment.output", "", 'experiment.output": got \'\''),
        ("experiment.output", 3, 'experiment.output": got 3'),
        ("experiment.max_batches", 1.5, 'experiment.max_batches": got 1.5'),
        ("experiment.max_seconds", "60", "experiment.max_seconds\": got '60'"),
        ("experiment.exit_confidence", 0.5, "exit_confidence\": got 0.5"),
        ("experiment.exit_confidence", [0.5, 2], "exit_confidence.1\": got 2"),
        ("experiment.num_stages", True, 'num_stages": got True'),
        ("experiment.num_stages", 2, "got 2 for 1 processes"),
        ("experiment.recipe", "theirs", "recipe.*got 'theirs'"),
        ("experiment.recipe", ["ours"], 'experiment.recipe": got'),
        ("experiment.test", 1, 'experiment.test": got 1'),
        ("experiment.label_smoothing", 0.1, "label_smoothing.*for bp_"),
        ("experiment.partition_memory", 2, "partition_memory.*for \"measured\""),
        ("experiment.epoch", 1, "experiment.epoch\" is not a key.*did you mean 'epochs'"),
        ("experiment.model", "mlp", 'experiment.model": got'),
        ("experiment.model.nme", "mlp", "experiment.model.nme.*did you mean 'name'"),
        ("experiment.model.options", [16], 'experiment.model.options": got'),
        ("experiment.data.nam", "x", "experiment.data.nam.*did you mean 'name'"),
        ("experiment.data.path", "", "experiment.data.path\": got ''"),
        ("experiment.data.path", "a\0b", "experiment.data.path.*without NUL"),
        ("experiment.data.max_length", 10**8, "max_length.*less than or equal"),
        ("experiment.data.image_size", "28", "image_size\": got '28'"),
        ("experiment.data.validation_fraction", 1, "validation_fraction\": got 1"),
        ("experiment.data.validation_fraction", True, "validation_fraction\": got True"),
        ("experiment.data.augment", "flipp", "augment\": got 'flipp'.*'flip'"),
        ("experiment.wandb.enable", False, "experiment.wandb.enable\".*did you mean 'enabled'"),
        ("experiment.wandb.tags", "a", "experiment.wandb.tags\": got 'a'"),
    ]
]  # fmt: skip

FLAGS: list[Case] = [
    Case(name=" ".join(given)[:60], given=given, message=message) for given, message in [
        (["--epochs", "3", "--seed", "1"], None),
        (["--output", "2024"], None),
        (["--set", "experiment.epochs=2"], None),
        (["--set", "experiment.epochs"], "expected key.path=value"),
        (["--set", "=3"], "expected key.path=value"),
        (["--set", "experiment..epochs=3"], "expected key.path=value"),
        (["--set", "experiment.epochs.x=3"], "is no object"),
        (["--set", "experiment.epochs=NaN"], "experiment.epochs.*finite"),
        (["--set", "experiment.epochs=1e400"], "experiment.epochs.*finite"),
        (["--set", 'experiment.model={"name": "mlp", "name": "vgg"}'], '"name" is given twice'),
        (["--set", "experiment.epochs=" + "[" * 100_000], "nested too deep"),
        (["--set", "experiment.epochs=null"], 'experiment.epochs": got None'),
        (["--set", "experiment.name=a\0b"], "without NUL"),
        (["--set", "experiment.epochs=zwei"], "experiment.epochs\": got 'zwei'"),
        (["--method", "1f1b"], "method\": got '1f1b'"),
        (["--method", ""], "method\": got ''"),
        (["--epochs", "0"], "experiment.epochs\": got 0"),
        (["--stages", "0"], "experiment.num_stages\": got 0"),
        (["--seed", "-1"], "experiment.seed\": got -1"),
        (["--seed", str(2**70)], "experiment.seed"),
        (["--output", ""], "experiment.output\": got ''"),
        (["--data-path", ""], "experiment.data.path\": got ''"),
        (["--exit-confidence", "abc"], "exit_confidence"),
        (["--exit-confidence", "0.5,"], "exit_confidence"),
        (["--exit-confidence", "0.5,0.9"], None),
    ]
]  # fmt: skip

ARGUMENTS: list[Case] = [
    Case(name=f"{given[0]} {' '.join(given[1:])}", given=given, message=message) for given, message in [
        (["train", "--epochs", "two"], "invalid int value: 'two'"),
        (["train", "--json", "/"], "expected the path of a file to write"),
        (["train", "--json", ""], "expected the path of a file to write"),
        (["train", "--json", "/dev/null/x.json"], "expected the path of a file to write"),
        (["plan", "--forward-ms", "-5"], "got '-5': expected a number of 0 or more"),
        (["plan", "--forward-ms", "nan"], "got 'nan': expected a number"),
        (["plan", "--forward-ms", "0"], "expected a number above 0"),
        (["plan", "--rho", "inf"], "expected a number"),
        (["plan", "--tflops", "0"], "expected a number above 0"),
        (["plan", "--stages", "0"], "expected a whole number from 1 on"),
        (["plan", "--stages", "2,x"], "expected a whole number from 1 on"),
        (["plan", "--stages", ","], "expected a whole number from 1 on"),
        (["plan", "--micro-batches", "4..x"], "expected a whole number from 1 on"),
        (["plan", "--queue-depth", "0"], "expected a whole number from 1 on"),
        (["plan", "--methods", "streaming"], "expected streaming, bp_1f1b"),
        (["plan", "--json", "/"], "expected the path of a file to write"),
        (["bench", "--sleeping", "--forward-ms", "-1"], "expected a number of 0 or more"),
        (["bench", "--sleeping", "--batches", "0"], "expected a whole number from 1 on"),
        (["bench", "--sleeping", "--methods", "gpipe"], "expected names of"),
        (["bench", "--check", "x.json", "--tolerance", "nan"], "expected a number of 0 or more"),
        (["bench"], "one of the arguments"),
        (["compare", "--suite", "small", "--json", "x.json", "--seeds", "0"], "expected a whole number from 1 on"),
        (["compare", "--suite", "small", "--json", "x.json", "--jobs", "-1"], "expected a whole number from 1 on"),
        (["compare", "--suite", "small", "--json", "x.json", "--timeout", "0"], "expected a number above 0"),
        (["compare", "--suite", "small", "--json", "/"], "expected the path of a file to write"),
        (["report", "runs", "--out", "/"], "expected the path of a file to write"),
    ]
]  # fmt: skip

OPTIONS: list[Case] = [
    Case(name=f"{model} {json.dumps(given)[:50]}", given=(model, given), message=message)
    for model, given, message in [
        ("mlp", {"widths": [16, 16]}, None),
        ("mlp", {"widths": [16, -3]}, "'mlp' cannot be built with .*-3.*negative dimension"),
        ("mlp", {"widths": [16, 0]}, "'mlp' cannot be built with .*has no elements"),
        ("mlp", {"widths": ["a", 16]}, "widths=.*'a': Input should be a valid integer"),
        ("mlp", {"widths": [True, 16]}, "widths=.*True: Input should be a valid integer"),
        ("mlp", {"widths": [16.0, 16]}, "widths=.*16.0: Input should be a valid integer"),
        ("mlp", {"widths": "16"}, "widths='16'"),
        ("mlp", {"widths": 16}, "widths=16: .*valid sequence|widths=16"),
        ("mlp", {"widths": [10**9, 10**9]}, "GiB, and a rank has .* GiB: make it smaller"),
        ("mlp", {"widths": [10**18]}, "cannot be built|make it smaller"),
        ("mlp", {"dropout": "0.1"}, "dropout='0.1'"),
        ("mlp", {"dropout": 7}, "cannot be built with .*dropout"),
        ("mlp", {"num_layers": True}, "num_layers=True"),
        ("mlp", {"width": [16]}, "got option 'width' .*'widths'"),
        ("mlp", {"bridge_hidden": -1}, "cannot be built"),
        ("vgg", {"blocks": [["N"]]}, "expected a channel count"),
        ("vgg", {"bridge": "mimik"}, "bridge='mimik'.*'mimic' or 'published'"),
        ("resnet", {"widths": []}, "widths|cannot be built"),
        ("vit", {}, "got AL model 'vit': expected one of"),
    ]
]  # fmt: skip

CASES: list[Case] = [*TEXTS, *DEEPSPEED, *OFF, *BLOCKS, *FLAGS, *ARGUMENTS, *OPTIONS]


@pytest.fixture(scope="module")
def images() -> DataFacts:
    return DataFacts.of(load_vision("fashion-mnist-small"))


def script(name: str) -> Any:
    """A module of ``run/``."""
    spec = importlib.util.spec_from_file_location(f"run_{name}", ROOT / "run" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(given: dict[str, Any]) -> dict[str, Any]:
    """The base config with values at ``a.b.c``."""
    config = copy.deepcopy(BASE)
    for path, value in given.items():
        *parents, leaf = path.split(".")
        block = config
        for key in parents:
            block = block.setdefault(key, {})
        block[leaf] = value
    return config


@by_name(TEXTS)
def test_text_of_a_config(case: Case, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(case.given)
    meet(case, lambda: read_file(tmp_path / "config.json"), folder=tmp_path, seconds=10)


@by_name(DEEPSPEED)
def test_key_of_deepspeed(case: Case) -> None:
    meet(case, lambda: Description.of({**BASE, **case.given}), seconds=10)


@by_name(OFF)
def test_key_that_is_off(case: Case) -> None:
    config = {key: value for key, value in {**BASE, **case.given}.items() if key != "experiment"}
    settings = meet(case, lambda: Settings.of(config, is_al=True), seconds=10)
    assert settings is not None and settings.deepspeed["gradient_clipping"] == 0.0 and settings.zero_stage == 0


@by_name(BLOCKS)
def test_value_of_a_config(case: Case) -> None:
    meet(case, lambda: Description.of(checked(changed(case.given))), seconds=10)


@by_name(FLAGS)
def test_command_line(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = script("train")
    args = train.parser().parse_args(["--deepspeed_config", "x", *case.given])
    meet(case, lambda: Description.of(override(BASE, train.assignments(args))), folder=tmp_path, seconds=10)


@by_name(ARGUMENTS)
def test_arguments_of_other_commands(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    name, *given = case.given
    needed = ["--deepspeed_config", "x"] if name == "train" else []
    with pytest.raises(SystemExit) as caught, within(10):
        script(name).parser().parse_args([*needed, *given])
    error = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 2 and case.message is not None and case.message in error, error


@by_name(OPTIONS)
def test_option_of_a_model(case: Case, images: DataFacts) -> None:
    name, options = case.given
    experiment = experiment_config(changed({"experiment.model": {"name": name, "options": options}}))
    meet(case, lambda: Architecture(experiment, images).check(is_al=True), seconds=20)


def test_mapping() -> None:
    """What no file can hold is refused in a mapping, too, with its path."""
    for value, message in {
        math.nan: "finite",
        math.inf: "finite",
        torch.float16: "got a dtype",
        Path("a"): "Path",
    }.items():
        with pytest.raises(Exception, match=rf'"a.b": .*{message}') as caught:
            checked({"a": {"b": value}})
        assert type(caught.value).__name__ == "ALConfigError"
    with pytest.raises(Exception, match="got the key 3, a int: expected strings"):
        checked({"a": {3: 1}})
    itself: dict[str, Any] = {}
    itself["a"] = itself
    with pytest.raises(Exception, match="holds itself"):
        checked(itself)
    assert checked({"a": (1, 2.5)}) == {"a": [1, 2.5]}


@pytest.mark.parametrize("method", ["streaming", "bp_1f1b"])
def test_sizes_are_filled_in(method: str) -> None:
    config = {key: value for key, value in BASE.items() if key != "experiment"} | {BLOCK: {"method": method}}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for given, expected in {
        (None, 4, 3): (24, 4, 3),
        ("auto", 4, 3): (24, 4, 3),
        (24, "auto", 3): (24, 4, 3),
        (24, 4, None): (24, 4, 3),
        (None, 4, "auto"): (8, 4, 1),
        (8, None, None): (8, 4, 1),
    }.items():
        found = Settings.of({**config, **dict(zip(sizes, given, strict=True))}, is_al=method == "streaming", replicas=2)
        assert tuple(found.deepspeed[key] for key in sizes) == expected


@pytest.mark.parametrize("output", ["a file", "a file/below", "/proc/runs"])
def test_output_that_cannot_be_written_to(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    case = Case(name=output, given=output, message="experiment.output=.*cannot be written to.*--output")
    experiment = experiment_config(changed({"experiment.output": output}))
    meet(case, lambda: make_folder(experiment), folder=tmp_path)


def test_resume_finds_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("epoch_1")
    for given in ("run", "run/checkpoints"):
        assert checkpoints_of(tmp_path / given) == tmp_path / "run/checkpoints"
    for given in (tmp_path / "nowhere", ""):
        case = Case(name="nowhere", given=given, message="--resume .*is no folder")
        meet(case, lambda given=given: checkpoints_of(given), folder=tmp_path)


@pytest.mark.parametrize("seed", [True, "1", 1.0, None, -1, 2**32, 2**70])
def test_seed_of_a_module(seed: Any) -> None:
    case = Case(name="seed", given=seed, message="got base_seed=.*expected an integer from 0 to")
    meet(case, lambda: ALPipelineModule([], num_classes=2, base_seed=seed))


def test_the_config_of_a_run_runs_again() -> None:
    first = Description.of(changed({"experiment.recipe": "ours"}))
    again = Description.of({**first.config, "resolved": {"method": "streaming", "stages": 1}})
    assert again == first and "resolved" not in again.config
    assert (
        first.config["optimizer"]["type"] == "AdamW"
        and "objective" in first.config["experiment"]["model"]["al_options"]
    )
