"""The aviary: a dataset of drawn birds, made to test the claim of the GRAIN paper.

A species has one look for each of 8 parts (crest, beak, eye, throat, breast, wing, tail, legs;
101 looks, each with a phrase).  There are 120 training species in 24 genera and 40 held-out
species in 10 other genera.  Every look of a held-out species occurs in training. Only its name and
its combination of looks are new.  Web captions hold only the invented names; synthetic captions
and region descriptions describe parts.  `grain-jax aviary --output DIR` writes

  DIR/A.jsonl, images/            training images, annotated with a detector's noise
  DIR/seen/NAME/*, seen.json      new images of training species (class folders), D.json format
  DIR/unseen/NAME/*, unseen.json  images of held-out species, their descriptions
  DIR/test/A.jsonl, test/images/  exact boxes and words, no names; images of training species
                                  have even numbers, of held-out species odd ones; test/seen.jsonl and
                                  test/unseen.jsonl are the two halves (images below DIR/test)
  DIR/segmentation/seen/, unseen/ the test images of these species, with label images of their parts
  DIR/README.md                   describes the files
  DIR/settings.json               all settings; written first, and A.jsonl last

The data flow: `vocabulary` and `species` say what there is. `outlines`, `bird`, `palette`, `scenery` and
`props` give shapes and colours to `drawing` (image and exact boxes). `annotations` adds words and noise,
`masks` label images; `generate` writes the files.
"""
