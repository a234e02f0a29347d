"""One command a data set: from a publisher's files to our shards."""

from unival.data.prepare import coco_caption
from unival.data.prepare.base import DataSet

DATASETS: dict[str, DataSet] = {
    "coco_caption": coco_caption.DATASET,
}
