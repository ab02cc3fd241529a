"""Datamodules: few-shot splits of image data sets as samples with questions, targets and tasks."""

from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.datamodules.coco import COCODetectionDataModule
from rft_lightning.datamodules.images import ImagesDataModule
from rft_lightning.datamodules.shapes import ShapesDataModule

__all__ = ["COCODetectionDataModule", "ImagesDataModule", "RFTDataModule", "ShapesDataModule"]
