"""Words for what is wrong around the lungs.

Slots: {size} {side} {place} {hemi} {where} {lobe} {kind} {mm} {station} {device} {vessel}; a slot may be empty.
"findings" are sentences, "noun" are noun phrases.
"""

from __future__ import annotations

SIZE_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "pleural effusion": {
        "trace": (
            "trace",
            "minimal",
            "tiny",
        ),
        "small": (
            "small",
            "mild",
            "small-volume",
        ),
        "moderate": (
            "moderate",
            "moderate-sized",
            "medium-sized",
        ),
        "large": (
            "large",
            "massive",
            "large-volume",
            "extensive",
        ),
    },
    "pericardial effusion": {
        "small": (
            "small",
            "mild",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "moderate-sized",
        ),
        "large": (
            "large",
            "massive",
            "marked",
        ),
    },
    "cardiomegaly": {
        "mild": (
            "mild",
            "slight",
            "borderline to mild",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "marked",
            "gross",
        ),
    },
    "arterial wall calcification": {
        "mild": (
            "mild",
            "scattered",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "extensive",
            "heavy",
        ),
    },
    "coronary artery wall calcification": {
        "mild": (
            "mild",
            "minimal",
            "scattered",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "extensive",
            "heavy",
        ),
    },
    "hiatal hernia": {
        "small": (
            "small",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "moderate-sized",
            "",
        ),
        "large": (
            "large",
            "massive",
        ),
    },
    "lymphadenopathy": {
        "mild": (
            "mild",
            "",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "bulky",
            "marked",
        ),
    },
}

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "pleural effusion": {
        "findings": (
            "there is a {size} {side} pleural effusion",
            "a {size} pleural effusion is seen {hemi}",
            "{size} {side} pleural effusion is present",
            "{size} pleural fluid {hemi}, consistent with pleural effusion",
            "{size} free fluid layers in the {side} pleural space (pleural effusion)",
            "a {size} {side} pleural effusion is observed in the dependent hemithorax",
        ),
        "noun": (
            "{size} {side} pleural effusion",
            "{size} {side} pleural effusion",
            "{size} {side}-sided pleural effusion",
            "{size} pleural effusion {hemi}",
        ),
    },
    "pleural effusion/bilateral": {
        "findings": (
            "there are {size} bilateral pleural effusions",
            "{size} pleural effusions are seen {hemi}",
            "{size} bilateral pleural effusion is present",
            "{size} pleural effusion is observed in both hemithoraces",
            "{size} free fluid is seen in both pleural spaces, in keeping with bilateral pleural effusion",
        ),
        "noun": (
            "{size} bilateral pleural effusions",
            "{size} bilateral pleural effusion",
            "{size} pleural effusions {hemi}",
        ),
    },
    "pericardial effusion": {
        "findings": (
            "there is a {size} pericardial effusion",
            "{size} pericardial effusion is present",
            "{size} fluid surrounds the heart, consistent with pericardial effusion",
            "a {size} circumferential pericardial effusion is seen",
            "{size} fluid in the pericardial sac (pericardial effusion)",
        ),
        "noun": (
            "{size} pericardial effusion",
            "{size} pericardial effusion",
            "{size} pericardial effusion around the heart",
        ),
    },
    "cardiomegaly": {
        "findings": (
            "the heart is enlarged, {size} cardiomegaly",
            "there is {size} cardiomegaly",
            "{size} cardiomegaly is noted",
            "the cardiothoracic ratio is increased, in keeping with {size} cardiomegaly",
            "heart size is increased ({size} cardiomegaly)",
            "{size} enlargement of the heart, cardiomegaly",
        ),
        "noun": (
            "{size} cardiomegaly",
            "{size} cardiomegaly",
            "{size} cardiomegaly with enlarged heart",
        ),
    },
    "arterial wall calcification": {
        "findings": (
            "{size} calcified plaques are seen in the aortic wall",
            "there is {size} arterial wall calcification of the thoracic aorta",
            "{size} atherosclerotic wall calcifications in the aorta and its arch",
            "{size} calcific atherosclerosis of the aorta",
            "the aorta shows {size} wall calcifications",
        ),
        "noun": (
            "{size} aortic wall calcification",
            "{size} arterial wall calcification",
            "{size} calcified atherosclerosis of the aorta",
            "{size} aortic calcifications",
        ),
    },
    "medical material": {
        "findings": (
            "{device} is observed",
            "there is {device}",
            "{device} is seen",
            "{device} is present",
            "{device} is in place",
        ),
        "noun": (
            "{device}",
            "{device} in place",
            "status after placement of {device}",
        ),
    },
    "medical material/sternal wires": {
        "findings": (
            "sternotomy wires are observed in the sternum",
            "there are metallic sutures of a median sternotomy",
            "median sternotomy wires are seen",
            "sternal wires of an earlier operation are present",
        ),
        "noun": (
            "sternotomy wires",
            "median sternotomy wires",
            "post-operative sternal wires",
        ),
    },
    "coronary artery wall calcification": {
        "findings": (
            "{size} calcified atheroma plaques are observed in {vessel}",
            "there is {size} calcification of the wall of {vessel}",
            "{size} calcific plaques in {vessel}",
            "{size} coronary artery wall calcification, seen in {vessel}",
            "{vessel} shows {size} calcified plaques",
        ),
        "noun": (
            "{size} coronary artery calcification",
            "{size} coronary artery wall calcification",
            "{size} calcified plaques in {vessel}",
            "{size} coronary atherosclerosis with calcification",
        ),
    },
    "hiatal hernia": {
        "findings": (
            "a {size} hiatal hernia is observed",
            "there is a {size} sliding type hiatal hernia",
            "{size} hiatal hernia is seen at the lower end of the oesophagus",
            "part of the stomach lies above the diaphragm, {size} hiatal hernia",
            "a {size} hiatal hernia with an air-fluid level is present behind the heart",
        ),
        "noun": (
            "{size} hiatal hernia",
            "{size} sliding hiatal hernia",
            "{size} hiatus hernia",
        ),
    },
    "lymphadenopathy": {
        "findings": (
            "{size} lymphadenopathy is observed in {station}, the largest {mm} in short axis",
            "there are enlarged lymph nodes in {station}, the largest measuring {mm}",
            "pathologically enlarged lymph nodes up to {mm} are seen in {station}",
            "{size} lymphadenopathy with a short axis of {mm} in {station}",
            "lymph nodes in {station} are enlarged, up to {mm} in short axis, {size} lymphadenopathy",
        ),
        "noun": (
            "{size} lymphadenopathy in {station}",
            "enlarged lymph nodes in {station}",
            "lymphadenopathy up to {mm} in {station}",
            "{size} {kind} lymphadenopathy",
        ),
    },
}
