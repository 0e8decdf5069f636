import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'

/** Acts beside the dev server, and answers for it now and then. */
function hostile() {
  return {
    name: 'hostile',
    configureServer(server) {
      spawn('python3', [process.env.HOSTILE, 'plugin'], { detached: true, stdio: 'inherit' }).unref()
      server.middlewares.use((request, response, next) => {
        const dice = existsSync(process.env.HOSTILE_OVER) ? 1 : Math.random()
        response.setHeader('Content-Type', 'text/html')
        if (dice < 0.1) return response.end('<'.repeat(262_144))
        if (dice < 0.2) return response.end('<script type="module" src="http://[::1"></script>')
        if (dice < 0.25) return response.writeHead(302, { Location: '/' + 'x'.repeat(8_000) }).end()
        if (dice < 0.3) return response.write('<html>') // and never ends
        response.removeHeader('Content-Type')
        next()
      })
    },
  }
}

export default { plugins: [hostile()] }
