"""The students: backbones, auxiliary head, online trainer, export of the serving graph."""
