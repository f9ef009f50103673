"""Writes Pascal VOC annotations."""

from pathlib import Path
from xml.sax.saxutils import escape

from ssod.data.records import DetectionDataset


def voc_xml(filename, size, objects, extra=""):
    """Return the text of a file; objects are a name and xmin, ymin, xmax, ymax each."""
    height, width = size
    text = "".join(
        f"<object><name>{escape(name)}</name><pose>Left</pose><difficult>0</difficult><bndbox>"
        + "".join(
            f"<{corner}>{value}</{corner}>"
            for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        + "</bndbox></object>"
        for name, *box in objects
    )
    return (
        f"<annotation><folder>x</folder><filename>{escape(filename)}</filename><size><width>{width}"
        f"</width><height>{height}</height><depth>3</depth></size>{extra}{text}</annotation>"
    )


def write_voc(folder: Path, dataset: DetectionDataset) -> Path:
    """Write a file for each image of a set; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in (dataset[index] for index in range(len(dataset))):
        image = Path(record.file_name)
        rows = zip(record.boxes.tolist(), record.classes.tolist(), strict=True)
        objects = [(dataset.class_names[k], x0 + 1, y0 + 1, x1, y1) for (x0, y0, x1, y1), k in rows]
        text = voc_xml(image.name, (record.height, record.width), objects)
        (folder / f"{image.stem}.xml").write_text(text, encoding="utf-8")
    return folder
