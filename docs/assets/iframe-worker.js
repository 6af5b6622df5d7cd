// Makes search work on pages opened as files. Browsers refuse web workers there, so this runs the worker's script in a
// hidden iframe instead. Served over HTTP, the page keeps the browser's own workers.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.scope = frame.contentWindow
      this.scope.toPage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = new Promise(resolve => { this.scope.loaded = resolve })
      this.scope.document.open()
      this.scope.document.write(`<script>
        var postMessage = data => toPage(data)
        var importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((resolve, reject) => {
          const script = document.createElement("script")
          Object.assign(script, { src: url, onload: resolve, onerror: reject })
          document.body.appendChild(script)
        })), Promise.resolve())
      <\/script><body><script src="${url}" onload="loaded()"><\/script>`)
      this.scope.document.close()
    }
    postMessage(data) {
      this.loaded.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
