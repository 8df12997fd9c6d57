"""`elit.load_model`: one loader for networks of this library and elastified ones; importing it loads little."""

from pathlib import Path
from typing import Any

import torch

from elit.arguments import shortened
from elit.models.saved import ELASTIC, load_own
from elit.pretrained import model_folder
from elit.sampling.autoencoders import latent_channels, load_autoencoder


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """The network saved in `folder`: one of this library, or an elastified transformer; of a saved pipeline its own.

    "fashion" is the model that comes with the package, unless there is a folder of that name here.
    A checkpoint of a training run gives its averaged weights, however many processes it was sharded over.
    kwargs: as in diffusers' from_pretrained; `torch_dtype` is by default the dtype that was saved. Raises ValueError
    where the folder is missing, half-written or of another library.
    """
    folder = model_folder(folder)
    dtype = kwargs.get("torch_dtype")
    dtype = kwargs["torch_dtype"] = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype | None) or (dtype and not dtype.is_floating_point):
        raise ValueError(f"torch_dtype={shortened(dtype)}: give torch.float32, torch.bfloat16 or torch.float16")
    inner = folder / "transformer" if (folder / "model_index.json").is_file() else folder
    if (inner / ELASTIC).is_file():
        from elit.elastic.load import load_transformer  # and with it diffusers' hooks, which take a second

        return load_transformer(inner, **kwargs)
    return load_own(folder, **kwargs)


def is_stock_pipeline(model: str | Path) -> bool:
    """Whether a folder holds a diffusers pipeline whose transformer has a dial, or the add-on of one.

    By its files alone: `elit.elastic.stock` opens those.
    """
    folder = Path(model)
    if (index := folder / "model_index.json").is_file():
        return any(folder.glob(f"*/{ELASTIC}")) and '"ElitPipeline"' not in index.read_text(encoding="utf-8")
    return not (folder / "config.json").is_file() and any(
        (where / ELASTIC).is_file() for where in (folder, folder / "transformer")
    )


def load_network(
    name: str | Path,
    *,
    vae: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """What `elit.load_model` gives for `name`, ready to be sampled, and the autoencoder it was trained in.

    vae: its folder; by default the pipeline's that `name` is, and None where there is none.
    Raises ValueError as `elit.load_model` and `load_autoencoder` do, and for an autoencoder whose latents have another
    number of channels than the network.
    """
    from elit.models.transformer import Transformer  # slow to import, and `load_model` has imported it by now

    model = load_model(name, torch_dtype=dtype).to(device).eval()
    autoencoder = load_autoencoder(vae or Path(name) / "vae", required=vae is not None, torch_dtype=dtype)
    if autoencoder is None:
        return model, None
    channels = latent_channels(autoencoder)
    if isinstance(model, Transformer) and channels not in (None, model.config.in_channels):
        raise ValueError(
            f"vae={str(vae or name)!r}: its latents have {channels} channels, the network's samples "
            f"{model.config.in_channels}; give the autoencoder that it was trained in"
        )
    return model, autoencoder.to(device)
