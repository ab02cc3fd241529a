"""Datamodules: few-shot splits of image data sets as samples with questions, targets and tasks."""

from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.datamodules.cars196 import Cars196DataModule
from rft_lightning.datamodules.coco import COCODetectionDataModule
from rft_lightning.datamodules.custom_classification import CustomClassificationDataModule
from rft_lightning.datamodules.custom_detection import CustomDetectionDataModule
from rft_lightning.datamodules.fgvc_aircraft import FGVCAircraftDataModule
from rft_lightning.datamodules.flowers102 import Flowers102DataModule
from rft_lightning.datamodules.hub import HubDataModule
from rft_lightning.datamodules.images import ImagesDataModule
from rft_lightning.datamodules.lisa import LISAGroundingDataModule
from rft_lightning.datamodules.lvis import LVISDetectionDataModule
from rft_lightning.datamodules.mixture import Member, MixtureDataModule
from rft_lightning.datamodules.pets37 import Pets37DataModule
from rft_lightning.datamodules.shapes import ShapesDataModule

__all__ = [
    "COCODetectionDataModule",
    "Cars196DataModule",
    "CustomClassificationDataModule",
    "CustomDetectionDataModule",
    "FGVCAircraftDataModule",
    "Flowers102DataModule",
    "HubDataModule",
    "ImagesDataModule",
    "LISAGroundingDataModule",
    "LVISDetectionDataModule",
    "Member",
    "MixtureDataModule",
    "Pets37DataModule",
    "RFTDataModule",
    "ShapesDataModule",
]
