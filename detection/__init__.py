"""Pretrained encoders as Detectron2's weights, and detectors fine-tuned from them on COCO and VOC."""
