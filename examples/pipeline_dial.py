"""A dial for a diffusers pipeline in one file: elastify a tiny Flux, distil it, use it at three budgets (20 seconds).

Its weights are random: it shows the three calls, not pictures. `elit distill` does this for real pipelines.
"""

import time

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import elit


def tiny_flux() -> FluxPipeline:
    """Stock parts without text encoders: prompts are embeddings. 8×8 tokens of 32×32 pixels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, shift_factor=0.0)
    width = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": False}
    transformer = FluxTransformer2DModel(in_channels=16, num_layers=2, num_single_layers=6, **width, **text)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(steps: int = 150) -> None:
    pipe = tiny_flux()
    transformer = elit.elastify(pipe.transformer, read_after=1, write_after=7, window=(4, 4))  # 16 tokens a window
    size = {"height": 32, "width": 32, "num_inference_steps": 8, "output_type": "latent"}
    prompts = {"prompt_embeds": torch.randn(8, 5, 32), "pooled_prompt_embeds": torch.randn(8, 32)}

    def draw(budget: float) -> torch.Tensor:
        with elit.budget(budget):
            return pipe(**prompts, **size, generator=torch.Generator().manual_seed(0)).images

    calls = []  # what the pipeline asks of its transformer, and the answers
    hook = transformer.register_forward_hook(lambda _, args, asked, v: calls.append((asked, v[0])), with_kwargs=True)
    original = draw(1.0)
    hook.remove()
    before = {budget: (draw(budget) - original).std() for budget in (1.0, 0.5, 0.25)}

    optimizer = torch.optim.Adam(transformer.elastic.parameters(), lr=1e-3)
    for step in range(steps):
        asked, velocity = calls[step % len(calls)]
        with elit.budget(elit.draw_budget(0, step, range(1, 17))):
            loss = (transformer(**asked)[0] - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for budget, error in before.items():
        start = time.perf_counter()
        after = (draw(budget) - original).std()
        ms = 1e3 * (time.perf_counter() - start) / 8
        print(f"{budget:>4.0%}: distance to the original {error:.4f}, distilled {after:.4f}; {ms:.0f} ms a picture")


if __name__ == "__main__":
    main()
