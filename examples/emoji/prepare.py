"""Emoji of four styles as an ordinary folder of captioned pictures, for `elit train --data DATA/train`.

    pip install resvg-py
    python examples/emoji/prepare.py DATA

fetches four icon packages with npm (Noto Apache-2.0, Twemoji CC-BY-4.0, Fluent Emoji and Fluent Emoji Flat MIT) into
DATA/packages and writes

    DATA/train/STYLE/NAME.png, DATA/train/metadata.jsonl         pictures on white and their captions
    DATA/held-out/…                                              the same for 400 names that are not trained on

A line of metadata.jsonl is {"file_name", "text", "name", "style", "category"}; a picture has four lines, since people
say the style first, last or not at all. Nothing fetched or drawn here belongs into the repository.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

STYLES = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "fluent": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
}
CAPTIONS = ("{style} emoji of {name}", "{name}, {style} style", "{name} in {style} style", "{name}")
TONES = ("medium-light", "medium-dark", "light", "medium", "dark")
TONE = re.compile(rf"-({'|'.join(TONES)})(-skin-tone)?$")
NO_ARTICLE = re.compile(
    r"^(flag|keycap|letter|japanese|input|\d)|(s|[^s]s button|zzz|thread|bread|money|ice|fire|water)$"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DATA", help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default: 64)")
    parser.add_argument("--held-out", type=int, default=400, help="names kept out of training (default: 400)")
    parser.add_argument(
        "--variants",
        type=float,
        default=0.2,
        help="share kept of skin tones, keycaps and flags of countries, most of the pictures otherwise (default: 0.2)",
    )
    args = parser.parse_args()
    if args.size < 1 or args.held_out < 0 or not 0 <= args.variants <= 1:
        sys.exit("prepare.py: size must be at least 1, held-out at least 0, variants in [0, 1]")
    if shutil.which("npm") is None:
        sys.exit("prepare.py: needs npm, which comes with Node.js: apt-get install npm, or https://nodejs.org")
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        sys.exit("prepare.py: needs resvg-py, which draws SVG: pip install resvg-py")
    start = time.perf_counter()
    packages = args.out / "packages"
    icons, categories = {}, {}
    for style, package in STYLES.items():
        icons[style], known = read_package(fetch(package, packages))
        categories |= {canonical(name): category for category, names in known.items() for name in names}
    items = select(icons, args.variants)
    held_out = held_out_names(items, args.held_out)
    for folder in ("train", "held-out"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    lines: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    jobs = []
    for style, name, svg in items:
        part = "held-out" if base_name(name) in held_out else "train"
        path = args.out / part / style / f"{name}.png"
        jobs.append((svg, path, args.size))
        about = {"name": name, "style": style, "category": categories.get(name) or categories.get(base_name(name), "")}
        texts = [caption.format(style=style, name=phrase(name)) for caption in CAPTIONS]
        lines[part] += [{"file_name": f"{style}/{name}.png", "text": text, **about} for text in texts]
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(draw_icon, jobs, chunksize=64))
    failed = {path for (_, path, _), done in zip(jobs, drawn, strict=True) if not done}
    for part, rows in lines.items():
        rows = [row for row in rows if args.out / part / row["file_name"] not in failed]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / part / "metadata.jsonl").write_text(text, encoding="utf-8")
        counts = Counter(row["style"] for row in rows[:: len(CAPTIONS)])
        print(f"{part}: {sum(counts.values())} pictures ({', '.join(f'{n} {style}' for style, n in counts.items())})")
    (args.out / "held-out.txt").write_text("".join(f"{name}\n" for name in sorted(held_out)), encoding="utf-8")
    if failed:
        print(f"{len(failed)} icons could not be drawn, {min(failed)} for one")
    print(f"{len(held_out)} names held out, listed in {args.out / 'held-out.txt'}; {time.perf_counter() - start:.0f} s")


def fetch(package: str, folder: Path) -> Path:
    """The package's archive, from npm unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = f"{package.removeprefix('@').replace('/', '-')}-[0-9]*.tgz"
    if not (found := sorted(folder.glob(archives))):
        run = subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True)
        found = sorted(folder.glob(archives))
        if run.returncode or not found:
            sys.exit(f"prepare.py: cannot fetch {package}: {(run.stderr.strip().splitlines() or ['no archive'])[-1]}")
    return found[-1]


def read_package(archive: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """SVG by canonical name, and names by category."""
    with tarfile.open(archive) as tar:
        content = {
            name: json.load(tar.extractfile(f"package/{name}.json"))  # type: ignore[arg-type]
            for name in ("icons", "metadata")
        }
    icons = content["icons"]
    names = icons["icons"]
    svg = {}
    for name, icon in names.items():
        if icon.get("hidden"):  # older drawings of the same emoji
            continue
        box = [icon.get(key, icons.get(key, default)) for key, default in BOX]
        plain = TONE.sub("", name)
        svg[canonical(name) if plain in names else name] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
    return svg, content["metadata"].get("categories", {})


BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def canonical(name: str) -> str:
    """One spelling of a skin tone, which Fluent abbreviates."""
    return TONE.sub(r"-\1-skin-tone", name)


def base_name(name: str) -> str:
    """The name without skin tones, by which variants belong together."""
    while name != (name := re.sub(rf"-({'|'.join(TONES)})-skin-tone", "", name)):
        pass
    return name


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def select(icons: dict[str, dict[str, str]], variants: float) -> list[tuple[str, str, str]]:
    """(style, name, SVG) of every emoji, skin tones, keycaps and countries' flags thinned to a share of them."""
    items = []
    for style, drawings in icons.items():
        for name, svg in sorted(drawings.items()):
            tones = name.count("-skin-tone")
            thinned = tones == 1 or name.startswith(("keycap-", "flag-"))
            if (
                tones < 2
                and "tone" not in name.replace("-skin-tone", "")
                and not (thinned and share_of(name) >= variants)
            ):
                items.append((style, name, svg))
    return items


def held_out_names(items: list[tuple[str, str, str]], count: int) -> set[str]:
    """`count` base names, of those that have a drawing in at least three styles."""
    styles = Counter(name for _, name in {(style, base_name(name)) for style, name, _ in items})
    names = [name for name, drawn in styles.items() if drawn >= 3]
    return set(sorted(names, key=lambda name: share_of(f"held out {name}"))[:count])


def phrase(name: str) -> str:
    """waving-hand-medium-skin-tone -> a waving hand, medium skin tone."""
    if tone := re.search(rf"-({'|'.join(TONES)})-skin-tone$", name):
        return f"{phrase(name[: tone.start()])}, {tone[1].replace('-', ' ')} skin tone"
    words = name.removeprefix("flag-for-").replace("-", " ")
    if words.startswith("flag flag "):
        words = words.removeprefix("flag ")
    if words.startswith("flag ") and words != "flag in hole":
        return f"the flag of {words.removeprefix('flag ').title()}"
    if NO_ARTICLE.search(words):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw_icon(job: tuple[str, Path, int]) -> bool:
    """Draws one SVG on white as an RGB PNG; False where it cannot be drawn."""
    import resvg_py

    svg, path, size = job
    try:
        data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    except ValueError:
        return False
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    sheet = Image.new("RGBA", (size, size), "white")
    sheet.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.convert("RGB").save(path)
    return True


if __name__ == "__main__":
    main()
