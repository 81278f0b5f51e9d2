"""What a run reads, looked at before anything starts: model, problems with their right answers, the user's own code."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import TemplateError
from omegaconf import DictConfig

from rapo_verl.plan.job import files_of

OUR_REWARD = "pkg://rapo_verl.reward.function"
# What veRL's data set takes (utils/dataset/rl_dataset.py:173), with the word for it in a message.
KINDS = {".parquet": "parquet", ".json": "JSON", ".jsonl": "JSON"}


def may_be_hub_id(model: str) -> bool:
    """Return whether a model that is no folder here is named as the hub names one: owner/name."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def tokenizer_of(model: DictConfig) -> Any:
    """Return the tokenizer that veRL makes of ``actor_rollout_ref.model`` (verl 0.9.1 workers/config/model.py:153)."""
    from transformers import AutoTokenizer

    path = model.get("tokenizer_path") or model.path
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def problems_of_model(model: DictConfig) -> list[str]:
    """Return why ``actor_rollout_ref.model`` is no model to start from; a hub's is asked for its config."""
    path, own_tokenizer = str(model.path), not model.get("tokenizer_path")
    if Path(path).exists():
        wanted = ("config.json", "tokenizer_config.json")[: 1 + own_tokenizer]
        missing = [name for name in wanted if not (Path(path) / name).is_file()]
        return [
            f"actor_rollout_ref.model.path {path} is no Hugging Face checkpoint: it lacks {', '.join(missing)}; "
            "give a folder with model, config and tokenizer, or a hub id"
        ] * bool(missing)
    if not may_be_hub_id(path):
        return [
            f"actor_rollout_ref.model.path {path} does not exist; give a checkpoint folder or a hub id (owner/name). "
            "The toy's is made by `rapo toy make`"
        ]
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(path, "config.json")
    except (OSError, ValueError) as error:  # what the hub says, and of a name that cannot be one
        return [
            f"actor_rollout_ref.model.path {path} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); check the name, your token and the network, or download it first"
        ]
    return []


def problems_of_code(config: DictConfig) -> list[str]:
    """Return which of the user's own files or names are not there. They are read, not run."""
    reward, sampler = config.reward, config.trainer.v1.sampler.custom_sampler
    places = {
        "reward.custom_reward_function": reward.custom_reward_function,
        "data.custom_cls": config.data.custom_cls,
        "trainer.v1.sampler.custom_sampler": sampler,
    }
    if reward.reward_manager.get("source") == "importlib":
        places["reward.reward_manager.module"] = reward.reward_manager.module
    return [
        problem for key, node in places.items() if node.path for problem in _missing(key, str(node.path), node.name)
    ]


def _missing(key: str, path: str, name: str | None) -> list[str]:
    if path.startswith("pkg://"):
        module = path.removeprefix("pkg://").replace("/", ".")
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return [f"{key}.path is {path}, but there is no module {module} in this Python"]
        file = Path(spec.origin or "")
    else:
        file = Path(path.removeprefix("file://"))
    if not file.is_file():
        return [f"{key}.path: {path} does not exist"]
    if not name:
        return [f"{key}.name is empty; give the name in {path} that veRL shall take"]
    if file.suffix != ".py":
        return []
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        return [f"{key}.path: {path} is no Python ({error})"]
    names = _names(tree)
    if name in names or "*" in names:
        return []
    return [f"{key}.name is {name!r}, which {path} does not define; it has {', '.join(sorted(names)) or 'nothing'}"]


def _names(tree: ast.Module) -> set[str]:
    """Return what stands at the top of a module, in its branches too; "*" for what only running it would tell."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("globals", "exec", "setattr"):
            names.add("*")
    return names


def problems_of_data(config: DictConfig) -> list[str]:
    """Return what is wrong in the files of problems: missing, not readable, too few rows, no chat, no answer."""
    if config.data.custom_cls.path:
        return []  # its own reader
    found = []
    for key in ("train_files", "val_files"):
        rows = 0
        if not config.data[key]:
            found.append(f"data.{key} is {config.data[key]}; give a file of problems, or a list of them")
            continue
        for file in files_of(config, key):
            problems, count = _read(f"data.{key}: {file}", file, config)
            found += problems
            rows += count
        batch = config.data.train_batch_size
        if key == "train_files" and 0 < rows < batch:
            found.append(
                f"data.train_files has {rows} rows, fewer than data.train_batch_size ({batch}): "
                "no batch would ever be full; lower the batch size or add data"
            )
        elif key == "train_files" and rows:
            found += too_few_epochs(config, rows)
    return found


def too_few_epochs(config: DictConfig, rows: int) -> list[str]:
    """Return whether veRL's epochs are over before its steps are: it would end there with code 0 and save nothing."""
    trainer, most = config.trainer, config.data.train_max_samples
    an_epoch = (min(rows, most) if most > 0 else rows) // config.data.train_batch_size
    ends = an_epoch * trainer.total_epochs
    if not trainer.total_training_steps or ends >= trainer.total_training_steps:
        return []
    return [
        f"trainer.total_epochs={trainer.total_epochs} of {an_epoch} steps each end the run at step {ends}, before "
        f"trainer.total_training_steps={trainer.total_training_steps}; set trainer.total_epochs="
        f"{-(-trainer.total_training_steps // max(an_epoch, 1))} or lower the steps"
    ]


def _read(what: str, file: Path, config: DictConfig) -> tuple[list[str], int]:
    kind = KINDS.get(file.suffix)
    if not file.is_file():
        return [f"{what} does not exist; made by `rapo data prepare`, the toy's by `rapo toy make`"], 0
    wanted = [config.data.prompt_key, config.data.reward_fn_key, "reward_model"]
    try:
        table = read_table(file, wanted)
    except (OSError, ValueError, TypeError) as error:
        return [f"{what} is not a {kind or 'parquet'} file ({str(error)[:200]})"], 0
    if kind is None:
        return [f"{what}: veRL reads {', '.join(KINDS)} by the end of the name; rename it"], 0
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        return [f"{what} lacks the column(s) {', '.join(missing)} that veRL reads"], 0
    problems = [_chats(what, table[wanted[0]])]
    problems += _answers(what, table["reward_model"], config.reward.custom_reward_function.path == OUR_REWARD)
    return [problem for problem in problems if problem], table.num_rows


def read_table(file: Path, columns: list[str]) -> pa.Table:
    """Return those of the columns that a file of problems has."""
    if KINDS.get(file.suffix) != "JSON":
        parquet = pq.ParquetFile(file)
        return parquet.read([name for name in columns if name in parquet.schema_arrow.names])
    text = file.read_text(encoding="utf-8-sig")
    lines = [text] if text.lstrip().startswith("[") else [line for line in text.splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines]
    table = pa.Table.from_pylist(rows[0] if rows and isinstance(rows[0], list) else rows)
    return table.select([name for name in columns if name in table.column_names])


def _chats(what: str, prompts: pa.ChunkedArray) -> str:
    """Return what is wrong with a column of prompts: the template takes a text letter by letter for messages."""
    kind = prompts.type
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        return (
            f"{what}: its prompts are of type {kind}, not lists of messages; give "
            '[{"role": "user", "content": "..."}], as `rapo data prepare` does'
        )
    fields = {field.name for field in kind.value_type} if pa.types.is_struct(kind.value_type) else set()
    if not {"role", "content"} <= fields:
        return f"{what}: the messages of its prompts have no role and content, but {', '.join(sorted(fields)) or kind}"
    empty = pc.sum(pc.equal(pc.fill_null(pc.list_value_length(prompts), 0), 0)).as_py()
    return f"{what}: {empty} prompt(s) without a message" if empty else ""


def _answers(what: str, reward_model: pa.ChunkedArray, ours: bool) -> list[str]:
    """Return what is wrong with the right answers; another reward function than ours may want what it likes."""
    kind, field = reward_model.type, "reward_model.ground_truth"
    if not pa.types.is_struct(kind) or kind.get_field_index("ground_truth") < 0:
        return [f"{what} has no {field}, the right answer that every row needs"]
    if not ours:
        return []
    answers = pc.struct_field(reward_model, "ground_truth")
    if pa.types.is_null(answers.type):
        answers = answers.cast(pa.string())
    if not pa.types.is_string(answers.type) and not pa.types.is_large_string(answers.type):
        return [f"{what}: {field} is of type {answers.type}; allowed: a text, one answer a row (`rapo data prepare`)"]
    blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(answers, "")), "").combine_chunks()
    rows = [i for i, is_blank in enumerate(blank.to_pylist()) if is_blank]
    return [f"{what}: {field} is missing or empty in {len(rows)} row(s), first in {rows[0]}"] if rows else []


def prompt_tokens(row: dict[str, Any], config: DictConfig, tokenizer: Any) -> int:
    """Return the tokens of a row's prompt in the model's chat template."""
    options = dict(config.data.apply_chat_template_kwargs)
    chat = row[config.data.prompt_key]
    return len(tokenizer.apply_chat_template(chat, **{**options, "add_generation_prompt": True, "return_dict": False}))


def too_few_that_fit(config: DictConfig) -> list[str]:
    """Return whether veRL's filter of long prompts leaves less than a batch; reads no further than it must."""
    data = config.data
    files = files_of(config, "train_files")
    if not data.filter_overlong_prompts or data.custom_cls.path or any(file.suffix != ".parquet" for file in files):
        return []
    batches = (b for file in files for b in pq.ParquetFile(file).iter_batches(1024, columns=[data.prompt_key]))
    fit, rows, shortest = 0, 0, float("inf")
    try:
        tokenizer = tokenizer_of(config.actor_rollout_ref.model)
        for row in (row for batch in batches for row in batch.to_pylist()):
            tokens = prompt_tokens(row, config, tokenizer)
            rows, shortest = rows + 1, min(shortest, tokens)
            fit += tokens <= data.max_prompt_length
            if fit >= data.train_batch_size:
                return []
    except (OSError, ValueError, TemplateError) as error:  # there is no template, or it refuses the chat
        return [f"data.train_files: the model's tokenizer cannot render a prompt ({str(error)[:300]})"]
    return [
        f"data.filter_overlong_prompts leaves {fit} of {rows} prompts at data.max_prompt_length="
        f"{data.max_prompt_length} (the shortest has {shortest} tokens), fewer than data.train_batch_size "
        f"({data.train_batch_size}): raise the limit or lower the batch size"
    ]
