() => {  // Gives pictures their label as the text of screen readers, which Gradio leaves empty.
    const name = img => { img.alt ||= img.closest('.block').querySelector('label').textContent.trim() || 'Picture'; };
    new MutationObserver(() => document.querySelectorAll('.picture img, #plane img').forEach(name))
        .observe(document.body, {childList: true, subtree: true});
}
