for (const card of document.querySelectorAll("#contact-sheet .card")) pointAtRegions(card);
