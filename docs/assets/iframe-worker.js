// Browsers start no workers from files. Where the site is opened from disk, a hidden frame runs the one for the search.
if (location.protocol === "file:") {
    window.Worker = class extends EventTarget {
        constructor(url) {
            super();
            const frame = document.createElement("iframe");
            frame.hidden = true;
            document.body.append(frame);
            this.inside = frame.contentWindow;
            this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
            const script = this.inside.document.createElement("script");
            this.ready = new Promise(resolve => { script.onload = resolve; });
            script.src = url;
            this.inside.document.body.append(script);
        }
        postMessage(data) {
            this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})));
        }
    };
}
