() => {  // What screen readers need and Gradio leaves out: pictures' texts, and a role for the label of an empty frame.
    const name = img => { img.alt ||= img.closest('.block').querySelector('label').textContent.trim() || 'Picture'; };
    const mend = () => {
        document.querySelectorAll('.picture img, #plane img').forEach(name);
        document.querySelectorAll('.empty[aria-label]:not([role])').forEach(each => each.setAttribute('role', 'img'));
    };
    mend();
    new MutationObserver(mend).observe(document.body, {childList: true, subtree: true});
}
