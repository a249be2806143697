"""Names and numbers of the labels in a phantom's mask."""

ORGANS = (
    "background", "fat", "muscle", "bone", "right lung", "left lung", "airway", "heart", "aorta", "pulmonary vessels",
    "vena cava", "oesophagus", "liver", "spleen", "stomach", "breast", "table", "pleural effusion",
    "pericardial effusion", "consolidation", "lung nodule", "emphysema", "atelectasis", "arterial wall calcification",
)  # fmt: skip

ORGAN = {name: number for number, name in enumerate(ORGANS)}
