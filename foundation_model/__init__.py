"""The teacher: Kunlun, its online trainer and snapshots, and what students share with it."""
