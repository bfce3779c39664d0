"""Files of training rows."""

import json
from pathlib import Path


def save_rows(path: Path, plain: bool = False) -> Path:
    """Eight rows in LLaVA's format about the recorded pictures; one has none unless `plain`."""
    pictures = ["photo.jpg", "palette.png", "rgba.png", "tall_gray.png", "tiny.png", "wide.png", "cmyk.jpg"]
    rows = []
    for number, picture in enumerate(pictures):
        question = "<image>" if plain else f"<image>\nWhat is picture {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {picture.split('.')[0]}."}]
        rows.append({"id": str(number), "image": picture, "conversations": turns})
    if plain:
        rows.append({**rows[0], "id": "7"})
    else:
        turns = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good morning."}]
        rows.append({"id": "7", "conversations": turns})
    path.write_text(json.dumps(rows))
    return path
