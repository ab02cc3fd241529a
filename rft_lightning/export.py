"""`rft export`: the policy of a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from rft_lightning.checkpointing import check_export_folder, export_policy, read_record
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.loading import load_config, load_processor, resolve_checkpoint
from rft_lightning.policy_module import PolicyModule


def export(ckpt: str, output_dir: str | None = None, policy: str | None = None, merge: bool = True) -> None:
    """Write the tuned policy of a checkpoint as a folder that plain transformers load.

    One process does it, of whatever strategy and number of processes the checkpoint is, and holds the weights once.

    Args:
        ckpt: a checkpoint of `rft fit`, such as runs/csv/version_0/checkpoints/last.ckpt: a file, or the folder that
            `fsdp2` writes.
        output_dir: folder to write; an earlier export there is replaced. `policy` in the run's folder by default, or
            `adapters` for these alone.
        policy: the checkpoint that training started from, where it has moved since.
        merge: merge LoRA adapters into the weights; false writes the adapters alone, for peft.
    """
    record = read_record(ckpt)
    base = policy or record["policy"]
    folder = Path(output_dir or default_folder(ckpt, "policy" if merge else "adapters"))
    check_export_folder(folder)
    try:
        load_config(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Training started from this policy; if it has moved, say where it is: --policy FOLDER."
        ) from error
    if folder.exists() and folder.samefile(resolve_checkpoint(base)):
        raise ConfigConflictError(
            f"{folder} is the policy that training started from, which the checkpoint still needs. Choose another "
            "output_dir."
        )
    if not merge and record["settings"]["lora"] is None:
        raise ConfigConflictError(f"{ckpt} has no adapters: all weights were trained. Leave out --merge false.")
    module = PolicyModule(base, **record["settings"])
    module.load_for_sampling(ckpt)
    assert module.policy is not None
    processor = load_processor(base, **record["pixel_limits"])
    export_policy(module.policy, processor, folder, record=record, merge=merge, in_place=True)
    if merge:
        print(f"The tuned policy is in {folder}; use it as --model.policy {folder}, or with plain transformers")
    else:
        print(f"The adapters are in {folder}; use them with peft, over {base}")


def default_folder(ckpt: str, name: str = "policy") -> Path:
    """`name` in the folder of the run, where HFExport writes too; beside a checkpoint that lies in no `checkpoints`."""
    folder = Path(ckpt).absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / name
