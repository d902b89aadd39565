"""The aviary: an embedded data set of drawn birds, made so that GRAIN's claim can be tested.

A species is a look of each of 8 parts (crest, beak, eye, throat, breast, wing, tail, legs; 101
looks, each with a phrase).  120 training species in 24 genera, and 40 held-out ones in 10 genera of
their own, made in the same way of looks that all occur in training: new are their names and
combinations.  Web captions tell only the invented names; parts are told by synthetic captions and
by region descriptions.  `python -m data.aviary --output DIR` writes

  DIR/A.jsonl, images/            training images, annotated with a detector's noise
  DIR/seen/NAME/*, seen.json      new images of training species (class folders), D.json format
  DIR/unseen/NAME/*, unseen.json  images of held-out species, their descriptions
  DIR/test/A.jsonl, test/images/  exact boxes and words, no names; even numbers are of training
                                  species, odd ones held out; test/seen.jsonl and
                                  test/unseen.jsonl are the two halves (images below DIR/test)
  DIR/README.md, settings.json    what it is; written last, all settings

Modules, in the order of the data flow: `vocabulary` (looks and phrases), `species`, `outlines`,
`bird`, `palette`, `scenery`, `props`, `drawing` (image and exact boxes), `annotations` (words,
boxes and their noise), `generate` (files).
"""
