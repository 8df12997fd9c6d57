"""What the page says in numbers: costs beside the dial, tables under pictures."""

from collections.abc import Sequence
from html import escape

from elit.play.engine import Cost, Picture


def cost_words(cost: Cost, latents: str) -> str:
    """Beside the budget: latents, GFLOPs with a meter, milliseconds, expected quality."""
    share = cost.gflops / cost.full_gflops
    if cost.measured_ms is not None:
        time = f"<b>{cost.measured_ms:.0f} ms</b> measured"
    elif cost.predicted_ms is not None:
        time = f"<b>{cost.predicted_ms:.0f} ms</b> by this machine's profile"
    else:
        time = '<span class="quiet">time: after a run</span>'
    if cost.metric is None:
        quality = '<span class="quiet">quality: no sweep beside this model</span>'
    elif cost.quality is None:
        quality = f'<span class="quiet">{escape(cost.metric)}: not measured at these settings</span>'
    else:
        quality = f"expected {escape(cost.metric)} <b>{cost.quality:.4g}</b>"
    return (
        f'<div class="facts" aria-live="polite"><div class="meter" aria-hidden="true">'
        f'<i style="width:{100 * min(share, 1):.1f}%"></i></div>'
        f"<b>{cost.gflops:.4g} GFLOPs</b> a picture, {100 * share:.0f}% of the cost at full budget · {time}<br>"
        f'{quality} · <span class="quiet">{escape(latents)}</span></div>'
    )


def picture_words(picture: Picture) -> str:
    """Under a picture."""
    settings = picture.settings
    of = (settings.labels or settings.prompts)[0]
    return (
        f'<div class="facts">{escape(of)} · seed {settings.seed} · budget {escape(settings.budget)} · '
        f"<b>{picture.gflops:.4g} GFLOPs</b> · <b>{picture.ms:.0f} ms</b></div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for row in rows)
    return f'<div class="facts"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
